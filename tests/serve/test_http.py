"""The server over real sockets, asked by OpenAI's own client and by raw HTTP: what it answers, refuses and frees."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import time

import openai
import pytest

from jlora.serve import app
from jlora.serve.app import Limits
from jlora.serve.folders import Folders
from jlora.serve.http import Protocol
from tests.serve.parts import NAMES, Served, offline
from tests.wait import until

PROMPT = "Review : good film"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def want(served, name, prompt=PROMPT, count=16, chat=False):
    tokenizer = served.base.tokenizer
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new = offline(served.base, served.folder / name if name != "small" else None, tokens, count)
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    # a completion goes on from its prompt
    text = decode(new) if chat else decode([*tokens, *new])[len(decode(tokens)) :]
    return text, len(tokens), new


def test_the_openai_client_gets_each_adapters_own_answer(served, client):
    answers = set()
    for name in ("small", *NAMES):
        text, prompt, new = want(served, name)
        one = client.completions.create(model=name, prompt=PROMPT, temperature=0)
        ended = new[-1] == served.base.tokenizer.eos_token_id
        assert (one.choices[0].text, one.choices[0].finish_reason) == (text, "stop" if ended else "length")
        assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (prompt, len(new))
        pieces = list(client.completions.create(model=name, prompt=PROMPT, temperature=0, stream=True))
        assert "".join(p.choices[0].text for p in pieces) == text and len(pieces) >= len(text.split())
        assert [p.choices[0].finish_reason for p in pieces if p.choices[0].finish_reason] == [
            one.choices[0].finish_reason
        ]
        answers.add(text)
    assert len(answers) > 2
    assert [m.id for m in client.models.list()] == ["small", *NAMES]
    assert client.models.retrieve("film").parent == "small"


def test_chat_and_its_stream(served, client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "good film"}]}]
    rendered = served.base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "good film"}], tokenize=False, add_generation_prompt=True
    )
    text, prompt, new = want(served, "news", rendered, 12, chat=True)
    one = client.chat.completions.create(model="news", messages=messages, temperature=0, max_completion_tokens=12)
    assert (one.choices[0].message.role, one.choices[0].message.content) == ("assistant", text)
    stream = client.chat.completions.create(
        model="news",
        messages=messages,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == text
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.choices) == (prompt, len(new), [])
    long = client.chat.completions.create(model="news", messages=messages, extra_body={"ignore_eos": True})
    assert long.usage.total_tokens == 64  # as much as fits


def test_sampling_seed_and_stop(served, client):
    def draw(more=None, **settings):
        how = {"model": "film", "prompt": PROMPT, "temperature": 2.0, "max_tokens": 20} | settings
        return client.completions.create(**how, extra_body={"ignore_eos": True, **(more or {})}).choices[0]

    assert draw(seed=7).text == draw(seed=7).text
    assert len({draw().text for _ in range(4)}) > 1
    best = draw(temperature=0).text
    assert draw({"top_k": 1}).text == draw({"min_p": 1.0}).text == draw(top_p=1e-6).text == best
    word = best.split()[1]
    cut = draw(temperature=0, stop=[word, "never"])
    assert (cut.text, cut.finish_reason) == (best[: best.index(word)], "stop")


BAD = [
    ({"prompt": PROMPT}, 400, "model must be text"),
    ({"model": "absent", "prompt": PROMPT}, 404, "does not exist"),
    ({"model": "film"}, 400, "prompt must be text"),
    ({"model": "film", "prompt": ""}, 400, "prompt is empty"),
    ({"model": "film", "prompt": [1, 999]}, 400, "tokens from 0 to 14"),
    ({"model": "film", "prompt": ["a", "b"]}, 400, "one text"),
    ({"model": "film", "prompt": "\ud800"}, 400, "surrogate"),
    ({"model": "film", "prompt": "film " * 64}, 400, "at most 64 fit"),
    ({"model": "film", "prompt": "film " * 200}, 400, "1000 characters; at most 768 can fit"),
    ({"model": "film", "prompt": PROMPT, "max_tokens": 63}, 400, "more than the 64"),
    ({"model": "film", "prompt": PROMPT, "max_tokens": 0}, 400, "whole number from 1"),
    ({"model": "film", "prompt": PROMPT, "max_tokens": True}, 400, "whole number"),
    ({"model": "film", "prompt": PROMPT, "temperature": -1}, 400, "temperature must be"),
    ({"model": "film", "prompt": PROMPT, "top_p": 0}, 400, "top_p must be"),
    ({"model": "film", "prompt": PROMPT, "n": 2}, 400, "n = 2 is not supported"),
    ({"model": "film", "prompt": PROMPT, "logprobs": 3}, 400, "logprobs"),
    ({"model": "film", "prompt": PROMPT, "logprobs": 0}, 400, "logprobs = 0 is not supported"),
    ({"model": "film", "prompt": PROMPT, "n": True}, 400, "n = True is not supported"),
    ({"model": "film", "prompt": PROMPT, "messages": []}, 400, "messages = [] is not supported"),
    ({"model": "film", "prompt": PROMPT, "\ud800": "\ud800"}, 400, "? = ? is not supported"),
    ({"model": "film", "prompt": PROMPT, "stop": [""]}, 400, "stop string"),
    ({"model": "film", "prompt": PROMPT, "stream": 1}, 400, "stream must be true or false"),
]


@pytest.mark.parametrize(("body", "status", "says"), BAD)
def test_bad_requests_say_what_is_wrong(served, body, status, says):
    sent = json.dumps(body).encode()
    answer = served.http.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and says in error["message"] and error["type"] == "invalid_request_error"


ASKS_MORE = {
    "chat_template_kwargs": {"enable_thinking": False},
    "stop_token_ids": [3],
    "min_tokens": 4,
    "bad_words": ["film"],
    "guided_json": {},
    "structured_outputs": {"choice": ["good"]},
    "use_beam_search": True,
    "typical_p": 0.5,
    "prompt_logprobs": 0,
    "continue_final_message": True,
    "add_generation_prompt": False,
    "logprobs": True,
    "reasoning_effort": "low",
    "tools": [{"type": "function"}],
    "frequency_penalty": 0.5,
    "tempurature": 0,
}
# ChatOpenAI's of LangChain, vLLM's defaults, what OpenAI's client and page send
ASKS_NOTHING = {
    "n": 1,
    "logprobs": False,
    "seed": None,
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "logit_bias": {},
    "user": "somebody",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "stop_token_ids": [],
    "chat_template_kwargs": {},
    "add_generation_prompt": True,
    "guided_json": None,
}


def test_a_field_that_is_not_read_is_refused_unless_it_asks_for_nothing(served):
    said = {"role": "assistant", "content": "film", "refusal": None, "tool_calls": [], "function_call": None}
    body = {"model": "film", "messages": [{"role": "user", "content": "good"}, said], "max_tokens": 2}
    chat = lambda **more: served.post("/v1/chat/completions", **body | more)
    assert chat(**ASKS_NOTHING).status_code == 200
    for name, value in ASKS_MORE.items():
        error = chat(**{name: value}).json()["error"]
        assert error["param"] == name and f"{name} = {str(value)[:40]} is not supported here" in error["message"]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for more in ({"tool_calls": [call]}, {"function_call": call["function"]}):
        assert "messages[0] calls tools" in chat(messages=[said | more]).json()["error"]["message"]


def test_bodies_that_are_none(served, client):
    post = lambda content, kind="application/json": served.http.post(
        "/v1/chat/completions", content=content, headers={"content-type": kind}
    )
    for content in (b"", b"{", b"[1]", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"model": 1e999}'):
        assert post(content).status_code == 400, content[:20]
    assert post(b"{}", "text/plain").status_code == 415
    assert post(b" " * (Limits().body + 1)).status_code == 413
    chunks = (b" " * 65536 for _ in range(40))
    assert post(chunks).status_code == 413  # no content-length to tell it beforehand
    assert served.http.get("/v1/completions").status_code == 405
    assert served.http.get("/nothing").json()["error"]["message"].endswith("Not Found")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="absent", prompt=PROMPT)
    long = served.post("/v1/chat/completions", model="film", messages=[{"role": "user", "content": "a" * 1000}])
    assert long.status_code == 400 and "at most 768 can fit" in long.json()["error"]["message"]
    messages = [[], [{"role": "x", "content": "a"}], [{"role": "user", "content": 3}], "a"]
    messages.append([{"role": "user", "content": [{"type": "image_url"}]}])
    for bad in messages:
        answer = served.post("/v1/chat/completions", model="film", messages=bad)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages", bad
    assert answer.json()["error"]["message"] == (
        "the request: key 'messages[0].content[0]' must be a part of type text, as the model reads text alone, "
        "got str 'image_url'"
    )
    empty = [{"role": "user", "content": "good"}, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}]
    assert served.post("/v1/chat/completions", model="film", messages=empty, max_tokens=1).status_code == 200


def test_adapters_come_and_go_but_only_from_their_folders(served, tmp_path):
    load = lambda name, path, **more: served.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)
    folder = served.folder
    assert load("again", "news").text == "Success: LoRA adapter 'again' added successfully."
    ask = lambda name: served.post("/v1/completions", model=name, prompt=PROMPT, temperature=0)
    assert ask("again").json()["choices"][0]["text"] == want(served, "news")[0]
    assert load("again", str(folder / "film")).status_code == 400  # is there already
    assert load("again", str(folder / "film"), load_inplace=True).status_code == 200
    assert ask("again").json()["choices"][0]["text"] == want(served, "film")[0]
    assert served.post("/v1/unload_lora_adapter", lora_name="again").status_code == 200
    assert served.post("/v1/unload_lora_adapter", lora_name="again").status_code == 404
    assert ask("again").status_code == 404

    outside = tmp_path / "outside"
    outside.mkdir()
    for file in (folder / "news").iterdir():
        (outside / file.name).write_bytes(file.read_bytes())
    os.symlink(outside, folder / "link")
    (folder / "half").mkdir()
    (folder / "half" / "adapter_config.json").write_bytes((outside / "adapter_config.json").read_bytes())
    os.symlink(outside / "adapter_model.safetensors", folder / "half" / "adapter_model.safetensors")
    shutil.copytree(outside, folder / "told")
    os.symlink(outside / "README.md", folder / "told" / "chat_template.jinja")
    up = "/".join([".."] * 12) + str(outside)
    said = set()
    for path in (
        str(outside),
        "link",
        "half",
        "told",
        "film/../../base",
        up,
        "absent",
        "",
        "film\0",
        "\n",
        "a" * 5000,
        ".",
        "~",
    ):
        answer = load("x", path)
        assert answer.status_code == 400, path
        said.add(answer.json()["error"]["message"].removeprefix(path[:200]))
    assert len(said) == 1
    for name in ("../x", "", "a b", "x" * 200, "small", 3):
        assert load(name, "news").status_code == 400, name
    assert [m["id"] for m in served.http.get("/v1/models").json()["data"]] == ["small", *NAMES]
    assert set(Folders([folder]).found()) == set(NAMES)


@pytest.fixture
def spoken(served):
    """An adapter's folder of its own, under what is served."""
    folder = served.folder / "spoken"
    shutil.copytree(served.folder / "film", folder)
    yield folder
    shutil.rmtree(folder)


def test_an_adapter_speaks_by_the_chat_template_beside_it(served, spoken):
    load, template = {"lora_name": "spoken", "lora_path": "spoken"}, spoken / "chat_template.jinja"
    template.write_text("{% for m in messages %}")
    error = served.post("/v1/load_lora_adapter", **load).json()["error"]["message"]
    assert "spoken/chat_template.jinja: not a chat template: Unexpected end" in error
    template.write_text("{% for m in messages %}{{ m.content }} <unk> {% endfor %}")
    assert served.post("/v1/load_lora_adapter", **load).status_code == 200
    said = {"messages": [{"role": "user", "content": "good film"}], "max_tokens": 1}
    counts = {
        name: served.post("/v1/chat/completions", model=name, **said).json()["usage"]["prompt_tokens"]
        for name in ("spoken", "film", "small")
    }
    assert counts == {"spoken": 3, "film": 9, "small": 9}
    ends = {name: served.engine.shelf.speaker(held).ends for name, held in served.engine.shelf.held.items()}
    assert ends["spoken"] == (2, 0) and ends["film"] == served.base.ends == (2,)
    assert served.post("/v1/unload_lora_adapter", lora_name="spoken").status_code == 200


def test_swapping_an_adapter_under_load_drops_and_mixes_nothing(served):
    load = {"lora_name": "swap", "load_inplace": True}
    path = lambda n: ("film", "news")[n % 2]
    assert served.post("/v1/load_lora_adapter", **load, lora_path=path(0)).status_code == 200
    wanted, over, answers = {want(served, name, count=12)[0] for name in ("film", "news")}, threading.Event(), []

    def ask():
        while not over.is_set():
            answers.append(served.post("/v1/completions", model="swap", prompt=PROMPT, temperature=0, max_tokens=12))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for n in range(1, 21):
        assert served.post("/v1/load_lora_adapter", **load, lora_path=path(n)).status_code == 200
        seen = len(answers)
        until(lambda seen=seen: len(answers) > seen)
    over.set()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["choices"][0]["text"] for answer in answers} == wanted and len(wanted) == 2
    assert served.post("/v1/unload_lora_adapter", lora_name="swap").status_code == 200


def slowed(monkeypatch, engine):
    step = engine.batch.advance
    monkeypatch.setattr(engine.batch, "advance", lambda: (time.sleep(0.05), step()))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(served, stream, monkeypatch):
    slowed(monkeypatch, served.engine)
    before = served.engine.counts["finished_cancelled"]
    body = json.dumps({"model": "film", "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": stream})
    with served.raw(f"content-length: {len(body)}", body) as raw:
        until(lambda: any(len(r.new) > 2 for r in [*served.engine.batch.running.values()]))
        assert not stream or raw.recv(4096).startswith(b"HTTP/1.1 200")
    until(lambda: not served.engine.batch.running)
    assert served.engine.counts["finished_cancelled"] == before + 1
    assert not served.engine.shelf.bank.pins


def test_stopping_lets_answers_end_and_takes_no_more(place, monkeypatch):
    served = Served(*place)
    try:
        slowed(monkeypatch, served.engine)
        body = {
            "model": "film",
            "prompt": PROMPT,
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            served.server.should_exit = True  # all that SIGTERM's handler does
            until(lambda: not served.server.servers[0].sockets)
            with pytest.raises(OSError, match="refused"):
                served.raw("", "")
            rest = list(lines)
        assert first.startswith("data: {") and rest[-2:] == ["data: [DONE]", ""]
        assert '"finish_reason": "length"' in rest[-4]
    finally:
        served.close()


def test_metrics_and_health(served):
    assert served.http.get("/health").json() == {"status": "ok"}
    assert served.post("/v1/completions", model="absent", prompt=PROMPT).status_code == 404
    text = served.http.get("/metrics").text
    for line in ("jlora_slots 3.0", "jlora_waiting 0.0", 'jlora_responses_total{route="/v1/completions",status="404"}'):
        assert line in text, line
    served.http.get("/v1/models/absent")
    for n in range(60):
        served.http.get(f"/nothing{n}")
    text = served.http.get("/metrics").text
    assert len({line for line in text.splitlines() if line.startswith("jlora_responses_total")}) < 25


def test_what_fails_is_answered_and_counted(served, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "names", lambda: 1 / 0)
        answer = served.http.get("/v1/models", headers={"connection": "close"})
    assert answer.status_code == 500 and "its log says how" in answer.json()["error"]["message"]
    assert 'jlora_responses_total{route="/v1/models",status="500"} 1.0' in served.http.get("/metrics").text


def test_key_queue_and_time(place, monkeypatch):
    served = Served(*place, key="secret", limits=Limits(seconds=1.0, body_seconds=0.3), slots=1, queue=1)
    right = {"authorization": "Bearer secret"}
    post = lambda **more: served.post(
        "/v1/completions", headers=right, model="film", prompt=PROMPT, temperature=0, **more
    )
    try:
        for wrong in (None, "Bearer secre", "Basic secret", "Bearer"):
            headers = {} if wrong is None else {"authorization": wrong}
            answer = served.http.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert served.http.get("/metrics", headers=headers).status_code == 401
        assert served.http.get("/health").status_code == 200
        assert post().json()["choices"][0]["text"] == want(served, "film")[0]
        with served.raw("content-length: 50\r\nauthorization: Bearer secret", "{") as raw:
            assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        slowed(monkeypatch, served.engine)
        answers = []
        ask = lambda: answers.append(post(max_tokens=50, ignore_eos=True))
        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {a.status_code for a in answers} == {429, 408}
        refused = next(a for a in answers if a.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
    finally:
        served.close()


def test_prompts_that_are_read_are_bounded_and_on_time(place, monkeypatch):
    served = Served(*place, limits=Limits(seconds=5.0), slots=1, queue=1)
    over, answers = threading.Event(), []
    ask = lambda: answers.append(served.post("/v1/completions", model="film", prompt=PROMPT))
    threads = [threading.Thread(target=ask) for _ in range(5)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(app, "prompt_tokens", lambda *_: over.wait(60))
            for thread in threads:
                thread.start()
            until(lambda: len(answers) == 3)
            assert {answer.json()["error"]["code"] for answer in answers} == {"queue_full"}
            for thread in threads:
                thread.join()
        assert [answer.status_code for answer in answers] == [429] * 3 + [408] * 2
        over.set()
        assert served.post("/v1/completions", model="film", prompt="").status_code == 400  # it reads again
    finally:
        over.set()
        served.close()


def test_headers_that_do_not_come_end_the_connection_and_nothing_else_does(served, monkeypatch):
    monkeypatch.setattr(Protocol, "headers_within", 0.4)
    host, port = served.url.removeprefix("http://").split(":")
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"

    def dripped(raw):
        """Header lines, one every tenth of a second, until the server has closed or three seconds are over."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for n in range(30):
                raw.sendall(b"GET / HTTP/1.1\r\n" if n == 0 else b"x: y\r\n")
                time.sleep(0.1)
            return False
        return True

    with socket.create_connection((host, port)) as silent, socket.create_connection((host, port)) as slow:
        assert dripped(slow)
        silent.settimeout(20)
        assert silent.recv(100) == b""
    with socket.create_connection((host, port)) as raw:
        raw.settimeout(20)
        for _ in range(2):
            raw.sendall(whole)
            assert raw.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(1)  # idle, as long as keep-alive lets it
        assert dripped(raw)
    slowed(monkeypatch, served.engine)
    body = {"model": "film", "prompt": PROMPT, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    assert served.post("/v1/completions", **body).json()["usage"]["completion_tokens"] == 24  # longer than that


def test_requests_that_mean_two_things_are_refused(served):
    body = json.dumps({"model": "film", "prompt": PROMPT, "max_tokens": 1})
    size, next_one = f"content-length: {len(body)}", "GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    chunked = f"{len(body):x}\r\n{body}\r\n0\r\n\r\n"
    for headers, sent in (
        (f"{size}\r\ntransfer-encoding: chunked", chunked),
        (f"transfer-encoding: chunked\r\n{size}", body),
        (f"{size}\r\ncontent-length: {len(body) + 1}", body),
        (f"content-length: {len(body)}, {len(body) + 1}", body),
        (f"content-length: +{len(body)}", body),
        ("content-length: -1", body),
        (f"content-length : {len(body)}", body),
        ("transfer-encoding: xchunked", chunked),
        ("transfer-encoding: chunked, identity", chunked),
        ("transfer-encoding: chunked", "0x" + chunked),
        (f"{size}\r\nx: a\x00b", body),
        (f"{size}\r\nx: {'a' * 200_000}", body),
        (size + "\r\n" + "\r\n".join(f"x{n}: {'a' * 100}" for n in range(2000)), body),
    ):
        with served.raw(headers, sent + next_one) as raw:
            raw.settimeout(20)
            answer = b""
            with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
                while more := raw.recv(65536):
                    answer += more
        assert re.match(rb"HTTP/1.1 (4\d\d|501) ", answer), (headers[:80], answer[:80])
        assert answer.count(b"HTTP/1.1 ") == 1, f"what follows was taken for a request: {headers[:80]}"
    assert served.http.get("/health").status_code == 200


def test_nothing_that_a_client_sends_writes_a_line_of_the_log(served, caplog, capfd, monkeypatch):
    caplog.set_level("DEBUG", "uvicorn.error")
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "propagate", True)
    line = "%0d%0aERROR forged%1b[2J"
    assert served.http.get("/v1/models/" + line, headers={"authorization": "Bearer hf_secret"}).status_code == 404
    assert served.http.get("/" + line + "?token=hf_secret").status_code == 404
    assert served.post("/v1/completions", model="x\r\nforged", prompt="hf_secret").status_code == 404
    assert served.post("/v1/load_lora_adapter", lora_name="x", lora_path="\r\nforged").status_code == 400
    with served.raw("x\r\nforged hf_secret", "") as raw:
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")
    out = capfd.readouterr()
    own = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore")))
    assert "Invalid HTTP request received." in own  # the log is seen here
    assert "forged" not in own + out.out + out.err and "hf_secret" not in own + out.out + out.err
