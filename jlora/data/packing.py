"""Several examples a row, none of which sees another: no padding is paid for."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from jlora.data.batches import Batch, BatchSource, label_count
from jlora.data.tokens import Example


def pack(sizes: Sequence[int], order: Sequence[int], length: int) -> list[list[int]]:
    """Example numbers of each row of at most `length` tokens: each of `order` goes into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    first = 0  # rows before it are full for every size that comes
    least = min(sizes)
    for n in order:
        at = next((r for r in range(first, len(rows)) if room[r] >= sizes[n]), None)
        if at is None:
            rows.append([])
            room.append(length)
            at = len(rows) - 1
        rows[at].append(n)
        room[at] -= sizes[n]
        while first < len(rows) and room[first] < least:
            first += 1
    return rows


def collate_packed(
    rows: Sequence[Sequence[Example]], length: int, labels: int, pad: int = 0, own: Container[int] | None = None
) -> Batch:
    """One batch as `collate` makes, with segments i32 [b, s] (1, 2, ... by example, 0: padding) and places i32 [b, s]
    (the position of a token in its own example); own: as there. Raises ValueError where it cannot fit.
    """
    shape = (len(rows), length)
    out: Batch = {name: np.zeros(shape, np.int32) for name in ("segments", "places")}
    out |= {"tokens": np.full(shape, pad, np.int32), "mask": np.zeros(shape, bool)}
    out |= {name: np.zeros(labels, np.int32) for name in ("positions", "labels", "example")}
    out["weights"] = np.zeros(labels, np.float32)
    out["example"][:] = labels
    start = number = 0
    for r, row in enumerate(rows):
        at, mine = 0, own is None or r in own
        for segment, example in enumerate(row, start=1):
            size, where = len(example.tokens), np.flatnonzero(example.loss_mask[1:])
            if at + size > length or start + len(where) > labels:
                raise ValueError(f"row {r} does not fit {length} tokens and {labels} labels a batch")
            here, slot = slice(at, at + size), slice(start, start + len(where))
            if mine:
                out["tokens"][r, here], out["mask"][r, here] = example.tokens, True
                out["segments"][r, here], out["places"][r, here] = segment, np.arange(size)
            out["positions"][slot] = r * length + at + where
            out["labels"][slot] = example.tokens[where + 1]
            out["weights"][slot], out["example"][slot] = 1, number
            at, start, number = at + size, start + len(where), number + 1
    return out


class PackedSource(BatchSource):
    """A `BatchSource` of one shape, [batch, length] rows of packed examples; its batches hold segments and places.

    Rows are packed once; their order is drawn anew each epoch.
    """

    def __init__(self, examples: Sequence[Example], batch: int, length: int, **options: Any) -> None:
        super().__init__(examples, batch, [length], **options)
        order = np.random.default_rng(self.seed).permutation(len(examples))
        self.packed = pack([len(e.tokens) for e in examples], order.tolist(), length)
        counts = sorted((sum(label_count(examples[n]) for n in row) for row in self.packed), reverse=True)
        self.slots = max(1, sum(counts[:batch]))  # enough for any rows that come together
        self.per_epoch = -(-len(self.packed) // self.rows)

    def __getitem__(self, step: int) -> Batch:
        epoch, at = divmod(step, self.per_epoch)
        order = np.arange(len(self.packed))
        if self.steps is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        rows = [self.packed[n] for n in order[at * self.rows : (at + 1) * self.rows]]
        rows += [[]] * (self.rows - len(rows))
        parts = []
        for n in range(0, self.rows, self.batch):
            chosen = [[self.examples[i] for i in row] for row in rows[n : n + self.batch]]
            parts.append(collate_packed(chosen, self.lengths[-1], self.slots, self.pad, self.own))
        if self.accumulate == 1:
            return parts[0]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
