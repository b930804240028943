"""Disentangled attention (He et al. 2020): content and relative positions ask each other apart.

Axes: b batch, s and t positions, d model, h heads, k head size, p relative positions (2 x span). `config`: a
`DebertaConfig`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def relative_index(length: int, config: Any) -> np.ndarray:
    """i32 [s, t]: the row of the relative embeddings for each pair; beyond half the span, buckets grow by logarithm."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    if config.position_buckets > 0:
        mid = config.position_buckets // 2
        far = np.where(np.abs(distance) < mid, mid - 1, np.abs(distance))
        growth = np.log(far.astype(np.float32) / mid) / math.log((config.furthest - 1) / mid)
        bucket = np.ceil(growth.astype(np.float32) * (mid - 1)) + mid
        distance = np.where(far <= mid, distance, bucket * np.sign(distance)).astype(np.int64)
    return np.clip(distance + config.span, 0, 2 * config.span - 1).astype(np.int32)


class SelfAttention(nn.Module):
    """Content to content, content to position and position to content."""

    config: Any
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, relative: jax.Array, index: jax.Array, allowed: jax.Array) -> jax.Array:
        """x [b, s, d], relative [p, d], index i32 [s, t], allowed bool [b, t] -> [b, s, d]."""
        c = self.config
        dense = functools.partial(nn.Dense, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        split = lambda y: y.reshape(*y.shape[:-1], c.num_attention_heads, -1)
        project = {name: dense(name=f"{name}_proj") for name in ("query", "key", "value")}
        q, k, v = (split(layer(x)) for layer in project.values())
        terms = 1 + len({"c2p", "p2c"} & {*c.pos_att_type})
        scale = (q.shape[-1] * terms) ** -0.5
        scores = jnp.einsum("bshk,bthk->bhst", q, k)

        def places(name: str) -> jax.Array:
            own = project[name] if c.share_att_key else dense(name=f"pos_{name}_proj")
            return split(own(relative))

        if "c2p" in c.pos_att_type:
            by_place = jnp.einsum("bshk,phk->bhsp", q, places("key"))
            scores += jnp.take_along_axis(by_place, index[None, None], axis=-1)
        if "p2c" in c.pos_att_type:
            by_place = jnp.einsum("bthk,phk->bhpt", k, places("query"))
            scores += jnp.take_along_axis(by_place, index[None, None], axis=-2)
        scores = jnp.where(allowed[:, None, None], scores.astype(jnp.float32) * scale, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return jnp.einsum("bhst,bthk->bshk", weights, v).reshape(x.shape)
