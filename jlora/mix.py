"""Several trained adapters as one: sums with weights, on LoRA factors of any ranks.

An adapter is the difference it makes, D = scaling * A·B, a matrix a weight; w = -1 takes it away again.
- "linear": sum of w D, exactly: the factors side by side. With `rank`, its best approximation of that rank, by an SVD
  of the small matrix R_A R_B^T left when both sides are made orthonormal (A·B is never built).
  PEFT calls the first "cat" and the second "svd" (`rank` the largest one if not given); both names are taken.
- "factors": sums of the factors themselves, each times sqrt(|w| scaling) (PEFT's "linear"): products of one adapter's A
  with another's B come in, so it is no sum of differences. Equal ranks only.
- "prune": the `density` largest numbers of each D, then the sum.
- "ties" (Yadav et al. 2023, 2306.01708): of each D the `density` largest, for every number the sign with more mass,
  and the mean of those that have it.
- "dare" (Yu et al. 2024, 2311.03099): each number of D kept with probability `density`, divided by it; then the sum.
- "dare_ties": that, then TIES' signs and means.
The last four take one layer's D at a time and end in factors of `rank` by its SVD. Departures, both PEFT's: the largest
are those of one matrix, not of the whole adapter; TIES' means count adapters, not their weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jlora.analysis import matrices
from jlora.lora import LoraFactors, is_adapter, leaf_key
from jlora.tree import path_of

Method = Literal["linear", "cat", "svd", "factors", "prune", "ties", "dare", "dare_ties"]


def mix(
    adapters: Sequence[Any],
    weights: Sequence[float],
    method: Method = "linear",
    *,
    rank: int | None = None,
    density: float = 0.5,
    key: Any = None,
) -> Any:
    """One tree of `LoraFactors`, scaling 1, from trees of one structure; where one has None, it adds nothing.

    rank: of the result. If not given, the sum of ranks for "linear" and "cat", which may be more than the matrix has,
        else the largest one. An SVD gives at most what the matrix has; "factors" keeps the adapters' rank.
    density: the fraction kept, above 0 and at most 1. key: PRNG key of "dare".
    Raises ValueError for what is no LoRA factor, axes that differ, or settings out of range.
    """
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is not known: {', '.join(get_args(Method))} are")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: one each is needed")
    if not 0 < density <= 1:
        raise ValueError(f"density {density}: it must be above 0 and at most 1")
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}: it must be 1 or more")
    if method == "cat" and rank is not None:
        raise ValueError(f"rank {rank}: cat keeps every direction; svd cuts to a rank")
    key = jax.random.key(0) if key is None else key

    def at(keys: Any, *entries: Any) -> Any:
        path = path_of(keys)
        found = [(entry, w) for entry, w in zip(entries, weights, strict=True) if entry is not None]
        for entry, _ in found:
            if not isinstance(entry, LoraFactors):
                raise ValueError(
                    f"{path}: {kind(entry)}, and only LoRA factors are mixed: leave it out, or merge first"
                )
        if not found:
            return None
        if len({(e.layout, e.lora_a.shape[:-1], e.lora_b.shape[len(e.lora_a.shape) - 1 :]) for e, _ in found}) > 1:
            raise ValueError(f"{path}: the adapters are for weights of different shapes or axes")
        return one(
            path, [e for e, _ in found], [float(w) for _, w in found], method, rank, density, leaf_key(key, path)
        )

    return jax.tree_util.tree_map_with_path(at, *adapters, is_leaf=lambda x: x is None or is_adapter(x))


def kind(entry: Any) -> str:
    return entry.describe() if is_adapter(entry) else "trained whole"


def one(
    path: str,
    entries: Sequence[LoraFactors],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float,
    key: Any,
) -> LoraFactors:
    """The mixture's factors of one weight, f32, in the shapes of the first."""
    pairs = [tuple(x.astype(jnp.float32) for x in matrices(e)) for e in entries]  # [s, i, r], [s, r, o]
    scaled = [w * e.scaling for w, e in zip(weights, entries, strict=True)]
    ranks = [e.lora_a.shape[-1] for e in entries]
    if method in ("linear", "cat", "svd"):
        rank = max(ranks) if method == "svd" and rank is None else rank
        a = jnp.concatenate([a for a, _ in pairs], -1)
        b = jnp.concatenate([c * b for c, (_, b) in zip(scaled, pairs, strict=True)], -2)
        if rank is not None and rank < a.shape[-1]:
            a, b = jax.vmap(lambda a, b: shorter(a, b, rank))(a, b)
    elif method == "factors":
        if len(set(ranks)) > 1:
            raise ValueError(f"{path}: ranks {ranks}, and sums of factors need one: use linear with a rank")
        each = [
            (math.sqrt(abs(c)), a, math.copysign(math.sqrt(abs(c)), c) * b)
            for c, (a, b) in zip(scaled, pairs, strict=True)
        ]
        a, b = jnp.sum(jnp.stack([c * a for c, a, _ in each]), 0), jnp.sum(jnp.stack([b for *_, b in each]), 0)
    else:
        scale = [e.scaling for e in entries]
        keys = jax.random.split(key, pairs[0][0].shape[0])
        a, b = layers(pairs, keys, jnp.asarray(scale), jnp.asarray(weights), method, rank or max(ranks), density)
    shape_a, shape_b = entries[0].lora_a.shape, entries[0].lora_b.shape
    stack = entries[0].layout.count("s")
    a = a.reshape(*shape_a[:-1], -1)
    return LoraFactors(a, b.reshape(*shape_b[:stack], a.shape[-1], *shape_b[stack + 1 :]), 1.0, entries[0].layout)


def shorter(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """A [i, r], B [r, o] -> the best approximation of A·B of `rank`, its singular values' roots in each factor."""
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.T)
    exact = functools.partial(jnp.matmul, precision="highest")
    left, right = roots(exact(r_a, r_b.T), rank)
    return exact(q_a, left), exact(right, q_b.T)


def roots(d: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """[i, o] -> [i, rank], [rank, o] of its largest singular values."""
    u, s, vt = jnp.linalg.svd(d, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def layers(
    pairs: Any, keys: Any, scale: jax.Array, weights: jax.Array, method: str, rank: int, density: float
) -> tuple[jax.Array, jax.Array]:
    """The factors of every layer's mixture of D = scale * A·B, thinned out. pairs: ([s, i, r], [s, r, o]) each."""

    def layer(args: Any) -> tuple[jax.Array, jax.Array]:
        pairs, key = args
        deltas = jnp.stack(
            [c * jnp.matmul(a, b, precision="highest") for c, (a, b) in zip(scale, pairs, strict=True)]
        )  # [n, i, o]
        if method in ("prune", "ties"):
            deltas = jax.vmap(lambda d: largest(d, density))(deltas)
        else:
            deltas = jnp.where(jax.random.bernoulli(key, density, deltas.shape), deltas / density, 0)
        w = weights[:, None, None]
        if method not in ("ties", "dare_ties"):
            return roots((w * deltas).sum(0), rank)
        deltas = deltas * jnp.sign(w)  # an adapter taken away votes for the other sign
        agree = jnp.sign(deltas) == jnp.where(deltas.sum(0) >= 0, 1, -1)
        return roots((jnp.abs(w) * deltas * agree).sum(0) / jnp.maximum(agree.sum(0), 1), rank)

    return jax.lax.map(layer, (pairs, keys))


def largest(d: jax.Array, density: float) -> jax.Array:
    """d [i, o] with all but the `density` largest numbers by magnitude zero."""
    flat = d.ravel()
    keep = max(1, int(density * flat.size))
    _, places = jax.lax.top_k(jnp.abs(flat), keep)
    return jnp.zeros_like(flat).at[places].set(flat[places]).reshape(d.shape)
