"""LoftQ: codes and factors made together, so that their sum is near the weight (Li et al. 2023, arXiv 2310.08659).

Algorithm 1: Q_t = quantise(W - A_{t-1}·B_{t-1}), A_t·B_t = the rank-r SVD of W - Q_t, from A·B = 0, T times.
QLoRA starts at Q_1 with A·B = 0, an error of |W - Q_1|; here the factors take the largest part of what is left.
Departures: the root of the singular values goes to each factor, and the scaling alpha/r is divided out of both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.config import keep_base
from jlora.inits import pissa
from jlora.leaves import is_implicit
from jlora.lora import LoraFactors, axes_of, lorafy
from jlora.quant.leaf import QuantisedLeaf
from jlora.quant.schemes import scheme_of
from jlora.quant.tree import canonical, placed, quantise
from jlora.tree import Targets, path_of


def loftq(
    params: Any,
    rank: int,
    scheme: Any = "nf4",
    *,
    iterations: int = 5,
    quantised: Targets = "all-linear",
    **options: Any,
) -> tuple[Any, Any]:
    """(frozen, lora) for plain `params`: the adapted weights by LoftQ, the others that `quantised` means by `quantise`.

    iterations: T, 1 or more. options: as for `lorafy`, but init. The adapter fits this frozen tree alone: keep both,
    or merge. Raises ValueError as `lorafy` and `quantise` do, and for an init that changes the base.
    """
    keep_base("LoftQ", **options)
    if iterations < 1:
        raise ValueError(f"iterations = {iterations}: LoftQ takes 1 or more")
    frozen, lora = lorafy(params, rank, **options)
    made: dict[str, QuantisedLeaf] = {}

    def at(keys: Any, entry: Any, w: Any) -> Any:
        if not isinstance(entry, LoraFactors):
            return entry
        path = path_of(keys)
        leaf, entry = alternate(w, entry, scheme_of(scheme), iterations)
        made[path] = dataclasses.replace(leaf, path=path)
        return entry

    is_leaf = lambda x: x is None or isinstance(x, LoraFactors)
    lora = jax.tree_util.tree_map_with_path(at, lora, frozen, is_leaf=is_leaf)
    frozen = jax.tree_util.tree_map_with_path(lambda keys, w: made.get(path_of(keys), w), frozen, is_leaf=is_implicit)
    return quantise(frozen, scheme, targets=quantised, layouts=options.get("layouts")), lora


@functools.partial(jax.jit, static_argnames=("scheme", "iterations"))
def alternate(w: Any, entry: LoraFactors, scheme: Any, iterations: int) -> tuple[QuantisedLeaf, LoraFactors]:
    """(Q_T, its factors) of one weight, a matrix of a stack at a time."""
    matrices, rows, order, sizes = canonical(w, entry.layout)
    rank, scaling = entry.lora_a.shape[-1], entry.scaling
    if scaling <= 0:
        raise ValueError(f"alpha / rank is {scaling:g}: loftq divides by it, so it must be above 0")

    def one(m: jax.Array) -> Any:
        m = m.astype(jnp.float32)
        parts, a, b = None, jnp.zeros((m.shape[0], rank)), jnp.zeros((rank, m.shape[1]))
        for _ in range(iterations):
            parts = scheme.encode(m - scaling * jnp.matmul(a, b, precision="highest"))
            a, b = pissa(None, m - scheme.decode(parts, rows), rank, scaling)
        return parts, a, b

    stack = len(axes_of(entry.layout, "s"))
    every: Callable[[Any], Any] = one
    for _ in range(stack):
        every = functools.partial(jax.lax.map, every)
    parts, a, b = every(matrices)
    leaf = QuantisedLeaf(parts, scheme, rows, jnp.dtype(w.dtype), stack, layout=entry.layout)
    like = lambda new, old: new.reshape(old.shape).astype(old.dtype)
    factors = dataclasses.replace(entry, lora_a=like(a, entry.lora_a), lora_b=like(b, entry.lora_b))
    return placed(leaf, order, sizes), factors
