"""Turns of conversations, as the sets in use spell them, in the one form that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from jlora.data.files import DataError
from jlora.io.text import one_line

Message = dict[str, Any]
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
"""Who speaks: OpenAI's names and ShareGPT's."""
SPELLINGS = (("role", "from"), ("content", "value"))
"""A turn's keys, OpenAI's and ShareGPT's."""
TEXTS = ("name", "tool_call_id", "reasoning_content")
"""Keys of a turn beside its content that templates write, where they are set."""


def turns(value: Any, where: str, key: str, learnt: bool = True) -> tuple[Message, ...]:
    """The messages under `key`: {role, content}, or ShareGPT's {from, value}; with `tool_calls`, `TEXTS` and, where it
    is 0, `weight` (the turn carries no loss: `data/tokens.py`). A null is a key that is not there, as Parquet and the
    Hub fill every key that any turn of the set has. learnt: an assistant's turn of nothing is refused.

    Raises DataError naming the turn.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: key {key!r} must be a list of {{role, content}}, got {got(value)}")
    return tuple(_turn(turn, f"{where}: key '{key}[{n}]", learnt) for n, turn in enumerate(value))


def tools_of(record: Message, where: str) -> tuple[Message, ...]:
    """A row's `tools`: JSON schemas of what the model may call, in a list or, as sets of the Hub keep them, in its JSON
    text. Nulls are left out here too. Raises DataError."""
    value = record.get("tools") or []
    try:
        value = json.loads(value if isinstance(value, str) else json.dumps(value), object_hook=_set)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{where}: key 'tools' must be a list of objects, or its JSON, got {got(value)}") from None
    return tuple(_objects(value, f"{where}: key 'tools'"))


def learnable(messages: tuple[Message, ...]) -> bool:
    """Whether a turn carries a loss."""
    return any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages)


def answered(messages: tuple[Message, ...], where: str, key: str) -> tuple[Message, ...]:
    """The messages under `key`. Raises DataError where none carries a loss."""
    if not learnable(messages):
        but = " but of weight 0" if any(message["role"] == "assistant" for message in messages) else ""
        raise DataError(f"{where}: key {key!r} has no assistant turn{but}: there is nothing to learn from the row")
    return messages


def _turn(turn: Any, at: str, learnt: bool) -> Message:
    """at: where and what the turn is, with its quote left open."""
    if not isinstance(turn, dict):
        raise DataError(f"{at}' must be an object with role and content, got {got(turn)}")
    turn = _set(turn)
    speaker, said = (next((key for key in keys if key in turn), keys[0]) for keys in SPELLINGS)
    role = turn.get(speaker)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{at}.{speaker}' must be one of {', '.join(ROLES)}, got {got(role)}")
    calls = [_called(call) for call in _objects(turn.get("tool_calls", []), f"{at}.tool_calls'")]
    content = turn.get(said, "" if calls else None)
    out: Message = {"role": ROLES[role], "content": _content(content, f"{at}.{said}")}
    if learnt and out["role"] == "assistant" and not calls and not out["content"].strip():
        raise DataError(f"{at}.{said}' is empty, and no tool is called: there is nothing to learn from the turn")
    for key in TEXTS:
        if key in turn:
            out[key] = _whole_text(turn[key], f"{at}.{key}'")
    if calls:
        out["tool_calls"] = calls
    if _weight(turn.get("weight", 1), at) == 0:
        out["weight"] = 0
    return out


def _content(content: Any, at: str) -> str:
    if not isinstance(content, list):
        return _whole_text(content, f"{at}'")
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise DataError(f"{at}[{n}]' must be a part of type text, as the model reads text alone, got {got(kind)}")
    return "".join(_whole_text(part.get("text"), f"{at}[{n}].text'") for n, part in enumerate(content))


def _called(call: Message) -> Message:
    """Without the nulls beside a call's name; one among its arguments may be meant."""
    call = _set(call)
    inner = call.get("function")
    return call | {"function": _called(inner)} if isinstance(inner, dict) else call


def _objects(value: Any, at: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{at} must be a list of objects, got {got(value)}")
    try:
        whole(json.dumps(value, ensure_ascii=False), at)
    except (TypeError, RecursionError):
        raise DataError(f"{at} must be what JSON can hold, got {got(value)}") from None
    return value


def _set(record: Message) -> Message:
    """The keys of a record that are there."""
    return {key: value for key, value in record.items() if value is not None}


def _weight(weight: Any, at: str) -> Any:
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{at}.weight' must be 0 (the turn carries no loss) or 1, got {got(weight)}")
    return weight


def _whole_text(text: Any, at: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{at} must be text, got {got(text)}")
    return whole(text, at)


def whole(text: str, at: str) -> str:
    """JSON can spell half of a pair of surrogates, which is no text and which no tokenizer takes. Raises DataError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{at} holds half a character (a lone surrogate) at {error.start}") from None
    return text


def got(value: Any) -> str:
    """A value as messages name it."""
    return "nothing" if value is None else f"{type(value).__name__} {one_line(value, 40)!r}"
