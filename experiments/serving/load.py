"""Many clients at once against a real server: every answer right, every refusal the expected one, memory flat.

    python experiments/serving/load.py --model smollm2-135m-instruct --adapters runs [--minutes 10] [--clients 32]

Starts `jlora serve` itself, on the adapters in the folder that fit the model. Clients pick adapters at random and ask
greedily, streamed or not, each answer compared with the offline one of that adapter; they also break off in the middle,
send bodies that are too large or no JSON, ask for models that are not there, and load, use and unload adapters of their
own. 429 is waited out. Prints what was done, and the server's memory after a warm-up (every program once, and a quarter
of the time) and at the end; exits 1 after any wrong answer, unexpected status, or growth of more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import jlora
from jlora.data.tokens import prompt_ids
from jlora.generate import GenerateConfig, generate, pad_left
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.serve.folders import Folders

PROMPTS = [
    "Tweet: I love this so much\nSentiment:",
    "Review: A film that never ends, and never begins either.\nSentiment:",
    "Product review: It broke on the second day.\nSentiment:",
    "Editorial: The vote was close, the count was fair and the loser said so.\nSentiment:",
    "The capital of France is",
    "One, two, three, four,",
]
BODY = 1 << 16


MOST_WRONG = 100
"""After so many the run ends: a server that has died gives no more to see."""


def offline(model: str, folders: dict[str, Path], prompts: list[str], count: int) -> dict[tuple[str, str], str]:
    """{(adapter, prompt): what `generate` writes}; the adapter "" is the base. Those that do not fit are left out."""
    base = load(model)
    config, out = GenerateConfig(max_new_tokens=count, end=base.ends), {}
    decode = lambda tokens: base.tokenizer.decode(tokens, skip_special_tokens=True)
    rows = [prompt_ids(base.tokenizer, prompt) for prompt in prompts]
    for name, folder in {"": None, **folders}.items():
        params = base.params
        if folder is not None:
            try:
                frozen, lora, _ = load_adapter(base, folder)
            except (ValueError, OSError) as error:
                print(f"left out: {name}: {error}", file=sys.stderr)
                continue
            params = jlora.combine(frozen, lora)
        answers = generate(base.model, params, *pad_left(rows), config)
        for prompt, row, new in zip(prompts, rows, answers, strict=True):
            out[name, prompt] = decode([*row, *new])[len(decode(row)) :]  # a completion goes on from the prompt's text
    return out


class Load:
    """The clients' common state."""

    def __init__(self, url: str, base: str, folders: dict[str, Path], want: Any, count: int, clients: int) -> None:
        self.url, self.base, self.folders, self.want, self.count = url, base, folders, want, count
        self.clients, self.until = clients, 0.0
        self.prompts = sorted({prompt for _, prompt in want})
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def expect(self, what: str, answer: httpx.Response, status: int, says: str = "") -> None:
        self.done[what] += 1
        if answer.status_code != status or says not in answer.text:
            self.wrong.append(f"{what}: {answer.status_code} {answer.text[:200]!r}, expected {status}")

    async def post(self, http: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
        """As a patient client does: 429 is waited out."""
        while True:
            answer = await http.post(path, json=body)
            if answer.status_code != 429:
                return answer
            self.done["429, asked again"] += 1
            await asyncio.sleep(float(answer.headers["retry-after"]) * random.random())

    def greedy(self, name: str, prompt: str) -> dict[str, Any]:
        return {"model": name or self.base, "prompt": prompt, "temperature": 0, "max_tokens": self.count}

    def check(self, what: str, name: str, prompt: str, text: str) -> None:
        self.done[what] += 1
        if text != self.want[name, prompt]:
            self.wrong.append(f"{what}: {name or 'base'} after {prompt!r}: {text!r}, not {self.want[name, prompt]!r}")

    async def whole(self, http: httpx.AsyncClient, name: str, prompt: str, model: str | None = None) -> None:
        answer = await self.post(http, "/v1/completions", self.greedy(name if model is None else model, prompt))
        if answer.status_code == 200:
            self.check("greedy answer", name, prompt, answer.json()["choices"][0]["text"])
        else:
            self.expect("greedy answer", answer, 200)

    async def streamed(self, http: httpx.AsyncClient, name: str, prompt: str, leave: bool) -> None:
        body, text = {**self.greedy(name, prompt), "stream": True}, ""
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                self.done["429, asked again"] += 1
                await asyncio.sleep(float(answer.headers["retry-after"]) * random.random())
                return await self.streamed(http, name, prompt, leave)
            async for line in answer.aiter_lines():
                if leave:
                    self.done["broken off"] += 1
                    return
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        self.check("greedy stream", name, prompt, text)

    async def bad(self, http: httpx.AsyncClient) -> None:
        kind = {"content-type": "application/json"}
        far = json.dumps({**self.greedy("", "a"), "max_tokens": 10**7}).encode()
        absent = json.dumps({"model": "absent", "prompt": "a"}).encode()
        malformed = [(body, 400) for body in (b"{", b"\xff", b"[]", b'{"model": 1}', far)]
        body, status = random.choice([(b" " * (BODY + 1), 413), (absent, 404), *malformed])
        self.expect(f"bad body, {status}", await http.post("/v1/completions", content=body, headers=kind), status)

    async def own(self, http: httpx.AsyncClient, number: int) -> None:
        """Load an adapter under this client's name, use it, take it away."""
        name, mine = random.choice(list(self.folders)), f"client-{number}"
        body = {"lora_name": mine, "lora_path": str(self.folders[name])}
        self.expect("loaded", await self.post(http, "/v1/load_lora_adapter", body), 200)
        await self.whole(http, name, random.choice(self.prompts), mine)
        self.expect("unloaded", await self.post(http, "/v1/unload_lora_adapter", {"lora_name": mine}), 200)
        answer = await self.post(http, "/v1/completions", self.greedy(mine, self.prompts[0]))
        self.expect("unloaded and asked for", answer, 404)
        answer = await self.post(http, "/v1/load_lora_adapter", {"lora_name": mine, "lora_path": "../../etc"})
        self.expect("loaded from elsewhere", answer, 400)

    async def warm(self) -> None:
        """Every program that the run will need is compiled: what memory grows by afterwards is a leak."""
        everybody = ["", *self.folders]
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as http:
            for prompt in self.prompts:
                for name in everybody:
                    await self.whole(http, name, prompt)
                for names in ([""], everybody):
                    await asyncio.gather(*(self.whole(http, names[n % len(names)], prompt) for n in range(8)))

    async def client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as http:
            # everything once, then at random until the end
            first = [(n + number) % 5 for n in range(5)]
            while (first or time.monotonic() < self.until) and len(self.wrong) < MOST_WRONG:
                name, prompt = random.choice(["", *self.folders]), random.choice(self.prompts)
                what = first.pop() if first else random.choices(range(5), (9, 6, 2, 2, 1))[0]
                try:
                    match what:
                        case 0:
                            await self.whole(http, name, prompt)
                        case 1:
                            await self.streamed(http, name, prompt, leave=False)
                        case 2:
                            await self.streamed(http, name, prompt, leave=True)
                        case 3:
                            await self.bad(http)
                        case _:
                            await self.own(http, number)
                except httpx.HTTPError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")


def resident(pid: int) -> float:
    """MB of memory in use by a process; 0 if it has ended."""
    status = Path(f"/proc/{pid}/status")
    held = re.search(r"VmRSS:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return int(held[1]) / 1e3 if held else 0.0


async def run(load: Load, minutes: float, pid: int) -> list[float]:
    """All clients until the end; the server's memory, sampled on the way."""
    await load.warm()
    load.until = time.monotonic() + 60 * minutes
    memory = []

    async def watch() -> None:
        while held := resident(pid):
            memory.append(held)
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(load.client(n) for n in range(load.clients)))
    watching.cancel()
    return memory


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8, help="longest answer")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    folders = Folders([given.adapters]).found()
    want = offline(given.model, folders, given.prompts, given.tokens)
    folders = {name: folder for name, folder in folders.items() if (name, given.prompts[0]) in want}
    if not folders:
        raise SystemExit(f"{given.adapters} holds no adapter of {given.model}")
    command = [sys.executable, "-m", "jlora.cli", "serve", "--model", given.model, "--adapters", str(given.adapters)]
    command += ["--port", "0", "--name", "base", "--body-bytes", str(BODY), "--queue", str(max(given.clients // 2, 1))]
    command += ["--seconds", "600", "--resident", "3", "--max-length", "256"]
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:  # a pipe that nobody reads would fill
        with Path(log.name).open("w") as sink:
            server = subprocess.Popen(command, stderr=sink)
        try:
            report = drive(given, server, log, folders, want)
        finally:
            server.kill()
            server.wait()
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def drive(given: Any, server: Any, log: Any, folders: dict[str, Path], want: Any) -> dict[str, Any]:
    """The run against a server that is starting; its report."""
    text = lambda: Path(log.name).read_text(encoding="utf-8", errors="replace")
    while not (found := re.search(r"running on (http://\S+)", text())):
        if server.poll() is not None:
            raise SystemExit(text())
        time.sleep(0.2)
    url = found[1]
    load = Load(url, "base", folders, want, given.tokens, given.clients)
    memory = asyncio.run(run(load, given.minutes, server.pid))
    left = dict.fromkeys(("running", "waiting"), -1)
    if server.poll() is None:
        until = time.monotonic() + 60  # what was broken off ends after the present step
        while any(left.values()) and time.monotonic() < until:
            metrics = httpx.get(f"{url}/metrics", timeout=60).text
            left = {name: int(float(re.search(rf"^jlora_{name} (\S+)", metrics, re.M)[1])) for name in left}  # pyright: ignore[reportOptionalSubscript]
            time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=120)
    load.wrong += [line for line in text().splitlines() if "Error" in line]
    quarter = max(len(memory) // 4, 1)
    # the first quarter: the allocator and the adapters' places fill
    after, end = (float(np.median(part)) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    return {
        "done": dict(sorted(load.done.items())),
        "wrong": load.wrong[:20],
        "left in the server": left,
        "megabytes after the warm-up": round(after, 1),
        "megabytes at the end": round(end, 1),
        "growth": round(end / after - 1, 4),
        "exit": server.returncode,
    }


if __name__ == "__main__":
    found = main()
    if found["wrong"] or any(found["left in the server"].values()) or found["growth"] > 0.05:
        raise SystemExit(1)
