"""A classification or regression head on an encoder whose checkpoint holds none: drawn afresh, as transformers does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.io.tensors import Source
from jlora.models.tensors import HFTensor
from jlora.tree import paths

JUDGING = ("classify", "regress")
NEW = ("classifier", "pooler")
"""Modules that may be drawn afresh; nothing else of a model may be missing."""


def with_head(source: Source, tensors: Sequence[HFTensor], shapes: Any, seed: int = 0) -> tuple[Source, list[str]]:
    """(source, the paths drawn afresh): a head that is missing or of another number of classes is normal of deviation
    0.02 with a bias of 0, by `seed`.
    """
    leaves = paths(shapes)
    rng, made = np.random.default_rng(seed), {}
    for tensor in tensors:
        if not tensor.path.startswith(NEW):
            continue
        want = tuple(leaves[tensor.path].shape)[:: -1 if tensor.transpose else 1]
        if tuple(source.shapes.get(tensor.name, ())) != want:
            drawn = 0.02 * rng.standard_normal(want) if len(want) > 1 else np.zeros(want)
            made[tensor.name] = drawn.astype(np.float32)
    read = lambda name, index: made[name][index] if name in made else source.read(name, index)
    out = dataclasses.replace(source, shapes={**source.shapes, **{n: x.shape for n, x in made.items()}}, read=read)
    return out, sorted({tensor.path for tensor in tensors if tensor.name in made})
