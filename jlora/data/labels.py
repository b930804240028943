"""Sentences and pairs of sentences with a class or a number, for an encoder's head."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.data.batches import Batch, BatchSource
from jlora.data.files import DataError
from jlora.data.rows import Row
from jlora.data.tokens import Example


@dataclasses.dataclass(frozen=True)
class Labelled(Example):
    """An example whose tokens carry no loss; `types` i32 [n], 1 in the second of two sentences; `label` a class or a
    number."""

    types: np.ndarray
    label: float


def are_numbers(rows: Sequence[Row]) -> bool:
    """Whether the labels are numbers to be predicted rather than classes: all of them numbers, one with a point."""
    texts = [str(row.label) for row in rows]
    try:
        return all(np.isfinite(float(text)) for text in texts) and any("." in text for text in texts)
    except ValueError:
        return False


def class_weights(given: Sequence[str], classes: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """The weight of each class: of `given`, CLASS=WEIGHT each, 1 where there is none; for ("balanced",) n / (k its
    rows), of n rows of k classes (scikit-learn's `class_weight`). Raises ValueError for an unknown class, or no weight.
    """
    if list(given) == ["balanced"]:
        count = Counter(str(row.label) for row in rows)
        return [len(rows) / (len(count) * count[name]) if name in count else 1.0 for name in classes]
    weights = dict.fromkeys(classes, 1.0)
    for one in given:
        name, _, text = one.rpartition("=")
        if name not in weights:
            raise ValueError(
                f"class_weights: {one!r} is not CLASS=WEIGHT of a class ({', '.join(classes)}), nor balanced"
            )
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"class_weights: {one!r} has no weight above 0")
    return list(weights.values())


def label_examples(
    rows: Sequence[Row], tokenizer: Any, max_length: int, classes: Sequence[str] | None
) -> tuple[list[Labelled], int]:
    """(examples, how many were cut): the tokenizer's own form of a sentence or a pair, of two the longer cut first.

    classes: the names in the order of the head's outputs; None: labels are numbers. Raises DataError for a label that
    is none of them.
    """
    number = {name: n for n, name in enumerate(classes or ())}
    out, cut = [], 0
    for row in rows:
        texts = (row.text,) if row.pair is None else (row.text, row.pair)
        found = tokenizer(*texts, truncation=True, max_length=max_length)
        ids = found["input_ids"]
        cut += len(ids) == max_length and len(tokenizer(*texts, verbose=False)["input_ids"]) > max_length
        try:
            label = float(str(row.label)) if classes is None else number[str(row.label)]
        except (KeyError, ValueError):
            wanted = "a number" if classes is None else f"one of {', '.join(number)}"
            raise DataError(f"{row.where}: key 'label' must be {wanted}, got {row.label!r}") from None
        tokens = np.asarray(ids, np.int32)
        types = np.asarray(found.get("token_type_ids") or np.zeros_like(tokens), np.int32)
        out.append(Labelled(tokens, np.zeros(len(ids), bool), types, label))
    return out, int(cut)


class LabelSource(BatchSource):
    """A `BatchSource` of `Labelled`: tokens and types i32 [b, s], mask bool [b, s], labels f32 [b], weights f32 [b]
    (0 where a row holds no example)."""

    examples: Sequence[Labelled]

    def collated(self, chosen: np.ndarray, bucket: int) -> Batch:
        shape = (self.batch, self.lengths[bucket])
        out: Batch = {"tokens": np.full(shape, self.pad, np.int32), "mask": np.zeros(shape, bool)}
        out |= {"types": np.zeros(shape, np.int32)}
        out |= {name: np.zeros(self.batch, np.float32) for name in ("labels", "weights")}
        for n, example in enumerate(self.examples[i] for i in chosen):
            size = len(example.tokens)
            out["tokens"][n, :size], out["types"][n, :size] = example.tokens, example.types
            out["mask"][n, :size], out["labels"][n], out["weights"][n] = True, example.label, 1
        return out
