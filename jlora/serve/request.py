"""One request on its way through the engine: what is asked, and the text as it comes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]

CONTEXT = 5
"""Tokens of a prompt that a text which goes on from it is decoded after."""


class Event(NamedTuple):
    """New text, and in the last event why it ended; `message` says what went wrong."""

    text: str
    finish: Finish | None = None
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is wanted. The names are OpenAI's; top_k, min_p and seed as in vLLM. adapter: a `Shelf` entry or None.

    before: the end of `tokens`, where the text is to go on from theirs. Decoders that leave out the space before a
    text's first word (Llama 2's, Mistral's) keep it then.
    """

    tokens: tuple[int, ...]
    adapter: Any = None
    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    before: tuple[int, ...] = ()


class Request:
    """An `Ask` under way. `emit` gets its `Event`s, from the engine's thread; the last one has `finish`."""

    def __init__(self, ask: Ask, emit: Callable[[Event], None], deadline: float = float("inf")) -> None:
        self.ask, self.emit, self.deadline = ask, emit, deadline
        self.new: list[int] = []
        self.text, self.said = "", 0
        # tokens before `read` are in `text`, or in the prompt's; those from `settled` on are decoded again
        self.tokens, self.settled, self.read = list(ask.before), 0, len(ask.before)
        self.cancelled = False
        self.finish: Finish | None = None
        self.arrived, self.first = time.monotonic(), 0.0

    def take(self, token: int, tokenizer: Any, ends: Collection[int], last: bool) -> bool:
        """Count a token in and emit what text it settles; True if the request is over. last: there is no room more."""
        self.new.append(token)
        self.tokens.append(token)
        self.first = self.first or time.monotonic()
        ended = token in ends and not self.ask.ignore_eos
        last |= ended or len(self.new) >= self.ask.max_tokens
        fresh = self.fresh(tokenizer, last)
        text, found = cut(self.text, self.ask.stop, len(self.text) - len(fresh))
        over = found or last
        # what may begin a stop string is held back
        held = max((len(word) for word in self.ask.stop), default=1) - 1
        ready = len(text) if over else max(self.said, len(text) - held)
        piece, self.said = text[self.said : ready], max(ready, self.said)
        if over:
            self.end("stop" if found or ended else "length", piece)
        elif piece:
            self.emit(Event(piece))
        return over

    def fresh(self, tokenizer: Any, last: bool) -> str:
        """The text that the new tokens add to `text`; "" while they end in half of a character of several bytes.

        Only a few tokens are decoded: those since the one before the last text, which decides about a space between.
        """
        decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
        before, now = decode(self.tokens[self.settled : self.read]), decode(self.tokens[self.settled :])
        if len(now) == len(before) or (not last and now.endswith("\ufffd")):
            return ""
        self.settled, self.read = self.read, len(self.tokens)
        self.text += now[len(before) :]
        return now[len(before) :]

    def end(self, finish: Finish, text: str = "", message: str = "") -> None:
        """The last event."""
        self.finish = finish
        self.emit(Event(text, finish, message))


def cut(text: str, stop: tuple[str, ...], since: int) -> tuple[str, bool]:
    """(text before the first stop string, whether there was one). since: where the text begins that is new."""
    places = [text.find(word, max(since - len(word) + 1, 0)) for word in stop]
    places = [place for place in places if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
