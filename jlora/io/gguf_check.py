"""A GGUF header walked before it is believed: every count, length, type and offset lies within the file.

The layout (ggml's docs/gguf.md), little-endian: "GGUF", u32 version, u64 tensors, u64 keys; each key a string, u32 type
and value (an array: u32 type, u64 count, values); each tensor a string, u32 dimensions, u64 each, u32 type, u64 offset.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_ITEMS = 8_000_000
"""Of all arrays together: the largest vocabularies (262,144 tokens) have three arrays of that length."""
MOST_TENSORS, MOST_KEYS = 200_000, 100_000


class Walk:
    """A position in the file; every step stays in it."""

    def __init__(self, data: Any) -> None:
        self.data, self.at, self.items = data, 4, 0

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes are announced at byte {self.at}, the file has {len(self.data)}")
        self.at += size

    def number(self, kind: str) -> Any:
        at = self.at
        self.skip(struct.calcsize("<" + kind))
        return struct.unpack_from("<" + kind, self.data, at)[0]

    def string(self) -> bytes:
        size = self.number("Q")
        at = self.at
        self.skip(size)
        return self.data[at : self.at]

    def value(self, kind: int) -> Any:
        """A value; None for an array, whose items are only passed over."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"value type {kind} is not known")
        kind, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MOST_ITEMS or (kind not in SCALARS and kind != STRING):
            raise ValueError(f"an array of {count} items of type {kind}")
        if kind == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize("<" + SCALARS[kind]))
        return None


def check_gguf(path: Path, sizes: dict[int, tuple[int, int]]) -> None:
    """Raises ValueError, without a file's name, for what a reader should not be given.

    sizes: {tensor type: (elements, bytes) of a block}.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = Walk(data)
        version, tensors, keys = walk.number("I"), walk.number("Q"), walk.number("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are read")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise ValueError(f"{tensors} tensors and {keys} keys are announced")
        alignment, names = 32, set[bytes]()
        for _ in range(keys):
            name, value = walk.string(), walk.value(walk.number("I"))
            if name in names:
                raise ValueError(f"the key {name[:64]!r} stands in it twice")
            names.add(name)
            if name == b"general.alignment":
                alignment = value
        if not isinstance(alignment, int) or alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r}; it is a power of two")
        ends = [check_tensor(walk, sizes) for _ in range(tensors)]
        start = -(-walk.at // alignment) * alignment
        if start + max(ends, default=0) > len(data):
            raise ValueError(f"its tensors need {start + max(ends)} bytes, the file has {len(data)}")


def check_tensor(walk: Walk, sizes: dict[int, tuple[int, int]]) -> int:
    """Where the tensor's bytes end, counted from where all tensors begin."""
    name, axes = walk.string(), walk.number("I")
    if not 1 <= axes <= 4:
        raise ValueError(f"tensor {name[:64]!r} has {axes} axes")
    shape = [walk.number("Q") for _ in range(axes)]
    kind, offset = walk.number("I"), walk.number("Q")
    if kind not in sizes:
        raise ValueError(f"tensor {name[:64]!r} is of type {kind}, which is not known")
    block, size = sizes[kind]
    if shape[0] % block or 0 in shape:
        raise ValueError(f"tensor {name[:64]!r} {shape} is no whole number of blocks of {block}")
    return offset + math.prod(shape) // block * size
