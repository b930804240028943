"""JSON files that hold an object: read whole or refused, in one sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 64 * 2**20
"""Bytes of a JSON file; a shard index of a thousand billion parameters has about ten million."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises FileNotFoundError or ValueError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; no such file needs more than {LARGEST}")
    try:
        held = json.loads(path.read_text(encoding="utf-8"), parse_constant=not_a_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg} at line {error.lineno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON of any use: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path}: an object is expected, not {type(held).__name__}")
    return held


def not_a_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def shard_names(index: Path) -> list[str]:
    """The files that a shard index names, each once. Raises ValueError for one that is not in the same folder."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index}: weight_map must give a file name for each tensor")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise ValueError(f"{index} names {name!r:.80}: a shard lies in the same folder, under a plain file name")
    return names
