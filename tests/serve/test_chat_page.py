"""The chat page as a person uses it, in a real Chromium: pick, ask, compare, stop; at two widths, light and dark."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.serve.chromium import BINARY, Chromium
from tests.serve.parts import NAMES, offline
from tests.wait import until

pytestmark = pytest.mark.skipif(BINARY is None, reason="needs Chromium: apt-get install chromium")
PROMPT = "Review : good film"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    tab = Chromium(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


def pick(tab, **values):
    for name, value in values.items():
        tab.run(f"at({name!r}).value = {value!r}, at({name!r}).dispatchEvent(new Event('change'))")


def said(tab, turn):
    """The answers of a turn, once they are all there."""
    tab.until("!running && document.querySelectorAll('.busy').length === 0")
    return tab.run(
        f"[...document.querySelectorAll('.answers')[{turn}].querySelectorAll('.text')].map(e => e.textContent)"
    )


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1400, False)])
def test_two_adapters_side_by_side(served, tab, width, dark, tmp_path):
    tab.open(served.url + "/", width, 800, dark)
    tab.until("at('first').options.length === 4 && at('second').options.length === 5")
    pick(tab, first="film", second="news", mode="text", count=12)
    tab.run("at('prompt').focus()")
    tab.type(PROMPT)
    tab.press("Enter", 13)
    tokenizer = served.base.tokenizer
    tokens = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    answers = [offline(served.base, served.folder / name, tokens, 12) for name in ("film", "news")]
    want = [text([*tokens, *answer]).removeprefix(text(tokens)) for answer in answers]
    assert said(tab, 0) == want and want[0] != want[1]
    boxes = tab.run("[...document.querySelectorAll('article')].map(e => e.getBoundingClientRect().toJSON())")
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 1000)
    assert tab.run("document.documentElement.scrollWidth") == width
    back = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == dark
    folder = Path(os.environ.get("JLORA_SCREENSHOTS", tmp_path))
    tab.screenshot(folder / f"page-{width}.png")
    assert not tab.errors


def test_a_conversation_stop_and_what_goes_wrong(served, tab, monkeypatch):
    tab.open(served.url + "/")
    tab.until("at('first').options.length === 4")
    pick(tab, first="small", mode="chat", count=8)
    history = []
    for n, text in enumerate(("good film", "bad film")):
        tab.run("at('prompt').focus()")
        tab.type(text)
        tab.run("at('send').click()")
        history.append({"role": "user", "content": text})
        rendered = served.base.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        tokens = served.base.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        want = served.base.tokenizer.decode(offline(served.base, None, tokens, 8), skip_special_tokens=True)
        assert said(tab, n) == [want]
        history += [{"role": "assistant", "content": want}] if want else []
    step = served.engine.batch.advance
    monkeypatch.setattr(served.engine.batch, "advance", lambda: (time.sleep(0.1), step()))
    tab.run("at('clear').click()")
    pick(tab, first=NAMES[1], count=40)
    tab.type("x")
    tab.run("at('prompt').value = '<img src=x onerror=alert(1)>', at('send').click()")
    tab.until("at('send').textContent === 'Stop'")
    until(lambda: served.engine.batch.running)
    tab.run("at('send').click()")
    said(tab, 0)
    assert tab.run("document.querySelector('article span:last-child').textContent") == "stopped"
    assert tab.run("document.querySelectorAll('img').length") == 0
    until(lambda: not served.engine.batch.running)
    pick(tab, count=99999)
    tab.run("at('prompt').value = 'x', at('send').click()")
    assert "more than the 64" in said(tab, 1)[0]
    refused = [e for e in tab.errors if "400" in e["entry"]["text"]]
    assert len(refused) == len(tab.errors) == 1  # the browser's own note of the refused request
    tab.errors.clear()
