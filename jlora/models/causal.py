"""What decoders share: positions and masks, the cache, attention, and a stack of layers.

Axes: b batch, s sequence, t keys (the cache's length, or s), h query heads, g key heads, k head size.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def causal_inputs(
    tokens: jax.Array, positions: Any, mask: Any, segment_ids: Any, cache: Any
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """(positions i32 [b, s], allowed bool [b, s, t], seen bool [b, t], the column where this call begins).

    Positions are the running count of real tokens, so that padding may lie on either side; padding and, with
    `segment_ids`, other examples are never attended. Raises ValueError for segment_ids with a cache.
    """
    if segment_ids is not None and cache is not None:
        raise ValueError("segment_ids go with training, a cache with generation: give one of them")
    real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    real = real if segment_ids is None else real & (segment_ids > 0)
    index = 0 if cache is None else cache["index"]
    seen = real if cache is None else jax.lax.dynamic_update_slice(cache["mask"], real, (0, index))
    if positions is None:
        count = jnp.cumsum(seen, axis=1) - 1
        here = count if cache is None else jax.lax.dynamic_slice_in_dim(count, index, tokens.shape[1], 1)
        positions = jnp.maximum(here, 0)
    allowed = (jnp.arange(seen.shape[1]) <= index + jnp.arange(tokens.shape[1])[:, None]) & seen[:, None]
    if segment_ids is not None:
        allowed &= segment_ids[:, :, None] == segment_ids[:, None]
    return positions, allowed, seen, index


def grown(kv: Any, keys: jax.Array, values: jax.Array, index: Any) -> tuple[Any, jax.Array, jax.Array]:
    """(cache, keys, values) after writing [b, s, g, k] at column `index` of [b, t, g, k]; as given without a cache."""
    if kv is None:
        return None, keys, values
    k, v = (
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, index, 0, 0))
        for old, new in zip(kv, (keys, values), strict=True)
    )
    return (k, v), k, v


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, allowed: jax.Array, scale: float | None = None
) -> jax.Array:
    """Softmax attention, scores in float32: q [b, s, h, k], keys and values [b, t, g, k] -> [b, s, h, k].

    allowed bool [b, s, t]. h / g query heads share a key head. scale: 1 / sqrt(k) if not given.
    """
    groups = q.reshape(*q.shape[:2], keys.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("bsgrk,btgk->bgrst", groups, keys.astype(q.dtype)).astype(jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bgrst,btgk->bsgrk", weights, values.astype(q.dtype)).reshape(q.shape)


def stacked(block: Any, fields: tuple[Any, ...], layers: int, shared: int, scan: bool, remat: bool | str) -> Any:
    """The layers of a decoder, to be set as an attribute in `setup` and run by `through`.

    `shared`: how many arguments all layers get alike. scan: one module over a stack of parameters, else a list of
    them. remat: False, True (keep nothing of a layer) or "dots" (keep products with weights).
    """
    if remat:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        block = nn.remat(block, prevent_cse=not scan, policy=policy)
    if not scan:
        return [block(*fields) for _ in range(layers)]
    axes: Any = (0, *([nn.broadcast] * shared))
    stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=axes, length=layers)
    return stack(*fields)


def through(layers: Any, x: jax.Array, kv: Any, *shared: Any) -> tuple[jax.Array, Any]:
    """(x, kv) after all layers. kv: None, or arrays with a leading axis of layers."""
    if not isinstance(layers, list | tuple):
        return layers(x, kv, *shared)
    new = []
    for n, layer in enumerate(layers):
        x, one = layer(x, None if kv is None else jax.tree.map(lambda a, n=n: a[n], kv), *shared)
        new.append(one)
    return x, None if kv is None else jax.tree.map(lambda *rows: jnp.stack(rows), *new)
