"""Rows read by several processes: each tokenises its share, and all have every example."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jlora.data import DataError, Example, Labelled, Row
from jlora.distributed import from_every_process

Read = Callable[[list[Row]], tuple[list[Any], int]]
"""rows -> (examples or tuples of them, how many were cut)."""


def shared(rows: list[Row], read: Read) -> tuple[list[Any], int]:
    """`read(rows)`, each process reading an even part of them. Raises in every process what `read` raises in one."""
    count, mine = jax.process_count(), jax.process_index()
    if count == 1 or len(rows) < count:
        return read(rows)
    refused, told, wrong = None, b"", b""
    try:
        told = to_bytes(*read(rows[len(rows) * mine // count : len(rows) * (mine + 1) // count]))
    except ValueError as error:
        refused, wrong = error, str(error).encode()
    for other in from_every_process(wrong):
        if other:
            raise refused or DataError(other.decode())
    parts = [from_bytes(part) for part in from_every_process(told)]
    return [example for found, _ in parts for example in found], sum(cut for _, cut in parts)


def to_bytes(examples: Sequence[Any], cut: int) -> bytes:
    """As .npz: the fields of all examples in a row, each joined; `sizes` cuts those that have a value a token."""
    flat = [one for example in examples for one in (example if isinstance(example, tuple) else (example,))]
    fields = {name: [getattr(one, name) for one in flat] for name in names_of(type(flat[0]))}
    joined: dict[str, Any] = {name: np.concatenate(x) if np.ndim(x[0]) else np.asarray(x) for name, x in fields.items()}
    file = io.BytesIO()
    np.savez(file, cut=cut, each=len(flat) // len(examples), sizes=[len(one.tokens) for one in flat], **joined)
    return file.getvalue()


def from_bytes(told: bytes) -> tuple[list[Any], int]:
    """What `to_bytes` was given."""
    held = dict(np.load(io.BytesIO(told), allow_pickle=False))
    kind, each, cuts = Labelled if "label" in held else Example, int(held["each"]), np.cumsum(held["sizes"])[:-1]
    fields = (held[name].tolist() if name == "label" else np.split(held[name], cuts) for name in names_of(kind))
    flat = [kind(*values) for values in zip(*fields, strict=True)]
    return (flat if each == 1 else list(zip(*[iter(flat)] * each, strict=True))), int(held["cut"])


def names_of(kind: type[Example]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
