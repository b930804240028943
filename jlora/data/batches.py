"""Examples to batches of a few static shapes, in an order that depends on a seed and the step alone."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from jlora.data.tokens import Example

Batch = dict[str, np.ndarray]


def bucket_lengths(examples: Sequence[Example], count: int = 4, multiple: int = 8) -> list[int]:
    """At most `count` padded lengths, multiples of `multiple`: those that pad the examples to the fewest tokens."""
    rounded = [-(-len(example.tokens) // multiple) * multiple for example in examples]
    lengths, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    together = below[1:] - below[:-1, None]
    # padded[i, j]: tokens of the examples from the ith to the jth length, all padded to the jth
    padded = np.where(together > 0, together * lengths, np.inf)
    # least[j]: tokens of those of the shortest j lengths; starts[-1][j]: where the last bucket of them begins
    least, starts = np.array([0.0] + [np.inf] * len(lengths)), []
    for _ in range(count):
        both = least[:-1, None] + padded
        starts.append(np.append(0, both.argmin(axis=0)))
        least = np.append(0.0, both.min(axis=0))
    found, end = [], len(lengths)
    while end:
        found.append(int(lengths[end - 1]))
        end = int(starts.pop()[end])
    return found[::-1]


def label_count(example: Example) -> int:
    """How many tokens carry the loss; the first token has nothing before it to be predicted from."""
    return int(example.loss_mask[1:].sum())


def collate(
    examples: Sequence[Example],
    batch: int,
    length: int,
    labels: int,
    pad: int = 0,
    own: Container[int] | None = None,
) -> Batch:
    """One batch: tokens i32 [b, s] and mask bool [b, s] (True: real), right-padded, and the label positions
    positions i32 [l] into the flattened [b * s], labels i32 [l] (the token to be written next), weights f32 [l], and
    example i32 [l], which of the batch's examples a label belongs to.

    The head is computed at `positions` only. Slots with no label have weight 0. own: the rows whose tokens are filled;
    the others' are another process's. Labels are everybody's: the shapes `batch_parts.split_batch` makes depend on
    them, and must be the same in every process. Raises ValueError where it cannot fit.
    """
    total = sum(map(label_count, examples))
    if len(examples) > batch or total > labels or any(len(e.tokens) > length for e in examples):
        raise ValueError(
            f"{len(examples)} examples with {total} labels do not fit [{batch}, {length}], {labels} labels"
        )
    out: Batch = {
        "tokens": np.full((batch, length), pad, np.int32),
        "mask": np.zeros((batch, length), bool),
        "positions": np.zeros(labels, np.int32),
        "labels": np.zeros(labels, np.int32),
        "weights": np.zeros(labels, np.float32),
        "example": np.full(labels, batch, np.int32),
    }
    start = 0
    for n, example in enumerate(examples):
        if own is None or n in own:
            size = len(example.tokens)
            out["tokens"][n, :size] = example.tokens
            out["mask"][n, :size] = True
        where = np.flatnonzero(example.loss_mask[1:])
        slot = slice(start, start + len(where))
        out["positions"][slot] = n * length + where
        out["labels"][slot] = example.tokens[where + 1]
        out["weights"][slot] = 1
        out["example"][slot] = n
        start += len(where)
    return out


class BatchSource:
    """Batches by step: `source[step]`, a pure function of (seed, step), for grain's random-access `MapDataset`.

    Examples of one bucket make a batch, so the step compiles once a bucket; those that are left of one join the next
    longer, so that one step an epoch is not full. `accumulate` > 1 stacks that many batches on a leading axis:
    [accumulate, ...]. `steps` None: one pass in the given order (evaluation), unshuffled.
    `own`: rows of a batch whose tokens are filled; the order and the labels stay everybody's.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch: int,
        lengths: Sequence[int],
        *,
        seed: int = 0,
        steps: int | None = None,
        accumulate: int = 1,
        pad: int = 0,
        own: Container[int] | None = None,
    ):
        if not examples:
            raise ValueError("there are no examples to make batches of")
        self.examples, self.batch, self.lengths = examples, batch, sorted(lengths)
        self.seed, self.steps, self.accumulate, self.pad, self.own = seed, steps, accumulate, pad, own
        sizes = np.array([len(example.tokens) for example in examples])
        if sizes.max() > self.lengths[-1]:
            raise ValueError(f"an example of {sizes.max()} tokens is longer than the longest bucket {self.lengths[-1]}")
        self.bucket = np.searchsorted(self.lengths, sizes)
        self.members = [np.flatnonzero(self.bucket == n) for n in range(len(self.lengths))]
        self.labels = self.room([label_count(example) for example in examples])
        self.rows = batch * accumulate
        self.per_epoch = -(-len(examples) // self.rows)
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] | None = None

    def room(self, counts: Sequence[int]) -> list[int]:
        """Labels that each bucket's batches may hold, of examples with so many: some of them are of shorter buckets."""
        most = [np.asarray(counts)[members].max(initial=0) for members in self.members]
        return [self.batch * int(n) for n in np.maximum.accumulate(most)]

    def __len__(self) -> int:
        return self.per_epoch if self.steps is None else self.steps

    def __getitem__(self, step: int) -> Batch:
        bucket, chosen = self.plan(step // self.per_epoch)[step % self.per_epoch]
        parts = [self.collated(chosen[n : n + self.batch], bucket) for n in range(0, self.rows, self.batch)]
        if self.accumulate == 1:
            return parts[0]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def collated(self, chosen: np.ndarray, bucket: int) -> Batch:
        """One device step's batch of the examples with these numbers."""
        examples = [self.examples[i] for i in chosen]
        return collate(examples, self.batch, self.lengths[bucket], self.labels[bucket], self.pad, self.own)

    @property
    def shapes(self) -> int:
        """How many shapes of batches there are, so how often a step is compiled."""
        return len({bucket for bucket, _ in self.plan(0)})

    def longest(self) -> Batch:
        """A batch of the longest shape."""
        plan = self.plan(0)
        return self[max(range(len(plan)), key=lambda step: plan[step][0])]

    def plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(bucket, example numbers) of each step of an epoch: every example once."""
        held = self._epoch  # one tuple, replaced whole: grain's prefetching threads read it too
        if held is not None and held[0] == epoch:
            return held[1]
        rng = np.random.default_rng([self.seed, epoch])
        mixed = self.members if self.steps is None else [rng.permutation(members) for members in self.members]
        order = np.concatenate(mixed)
        steps = [order[n : n + self.rows] for n in range(0, len(order), self.rows)]
        if self.steps is not None:
            steps = [steps[n] for n in rng.permutation(len(steps))]
        plan = [(int(self.bucket[chosen[-1]]), chosen) for chosen in steps]
        self._epoch = (epoch, plan)
        return plan

    def iterator(self) -> Any:
        """A grain iterator over the steps; `get_state` and `set_state` are its checkpointable position."""
        import grain

        steps: Any = self  # has __len__ and __getitem__, which is all grain asks
        return iter(grain.MapDataset.source(steps).to_iter_dataset(grain.ReadOptions(num_threads=1)))
