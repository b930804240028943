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
    """(source, the paths drawn afresh): names of a bare encoder are read under their model's prefix, and a head that
    is missing or of another number of classes is normal of deviation 0.02 with a bias of 0, by `seed`.
    """
    leaves = paths(shapes)
    names = {tensor.name: tensor.name for tensor in tensors}
    prefix = next((t.name.partition(".")[0] + "." for t in tensors if t.path.startswith("embeddings/")), "")
    bare = {name: f"{prefix}{name}" for name in source.shapes if name not in names and f"{prefix}{name}" in names}
    stored = {bare.get(name, name): name for name in source.shapes}
    rng, made = np.random.default_rng(seed), {}
    for tensor in tensors:
        if not tensor.path.startswith(NEW):
            continue
        want = tuple(leaves[tensor.path].shape)[:: -1 if tensor.transpose else 1]
        if tensor.name not in stored or tuple(source.shapes[stored[tensor.name]]) != want:
            drawn = 0.02 * rng.standard_normal(want) if len(want) > 1 else np.zeros(want)
            made[tensor.name] = drawn.astype(np.float32)
    kept = {name: source.shapes[was] for name, was in stored.items()}
    read = lambda name, index: made[name][index] if name in made else source.read(stored[name], index)
    out = dataclasses.replace(source, shapes={**kept, **{n: x.shape for n, x in made.items()}}, read=read)
    return out, sorted({tensor.path for tensor in tensors if tensor.name in made})
