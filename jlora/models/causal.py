"""What decoders share: positions, masks, the cache, and the model around its layers.

Axes: b batch, s sequence, t keys (the cache's length, or s), d model, h query heads, g key heads, k head size,
v vocabulary, l layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.attention import Sight, attend


class Decoder(nn.Module):
    """A decoder but for `setup`, `states` and `head`, which are its family's. `remat`: as in `layers.stacked`."""

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: bool | str = False

    def states(self, tokens: jax.Array, positions: jax.Array, kv: Any, sight: Sight) -> tuple[jax.Array, Any]:
        """tokens, positions i32 [b, s], kv None or a cache's -> ([b, s, d] after the last norm, what is new of kv)."""
        raise NotImplementedError

    def head(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] -> logits f32 [..., v]."""
        raise NotImplementedError

    def __call__(self, tokens: jax.Array, **options: Any) -> Any:
        """tokens i32 [b, s] -> logits f32 [b, s, v]; options as for `hidden`; with a cache (logits, cache)."""
        hidden = self.hidden(tokens, **options)
        if options.get("cache") is not None:
            return self.head(hidden[0]), hidden[1]
        return self.head(hidden)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
    ) -> Any:
        """tokens i32 [b, s] -> [b, s, d] after the last norm; with a cache (hidden, cache).

        mask bool [b, s]: True for a real token. segment_ids i32 [b, s]: packed examples, 0 for padding.
        positions i32 [b, s]: the running count of real tokens if not given. cache: as `init_cache` makes it.
        Raises ValueError for segment_ids with a cache.
        """
        positions, sight, seen, index = causal_inputs(tokens, positions, mask, segment_ids, cache)
        kv = None if cache is None else cache["kv"]
        x, new = self.states(tokens, positions, kv, sight)
        if cache is None:
            return x
        return x, {"kv": written(kv, new, index), "mask": seen, "index": index + tokens.shape[1]}

    def key_heads(self) -> tuple[int, int]:
        """(g, k)."""
        return self.config.num_key_value_heads, self.config.head_dim

    def init_cache(self, batch: int, size: int) -> dict[str, Any]:
        """A cache for `size` tokens in each of `batch` rows: keys and values, which are real, how many there are.

        Keys, and values, are [l, b, g, t, k] for layers that are scanned, else a tuple of [b, g, t, k], one a layer:
        the columns of a head lie together, as the products with them want it.
        """
        layers, (g, k) = self.config.num_hidden_layers, self.key_heads()
        zeros = lambda *stack: jnp.zeros((*stack, batch, g, size, k), self.dtype)
        one = lambda: zeros(layers) if self.scan_layers else tuple(zeros() for _ in range(layers))
        return {"kv": (one(), one()), "mask": jnp.zeros((batch, size), bool), "index": jnp.zeros((), jnp.int32)}


def causal_inputs(
    tokens: jax.Array, positions: Any, mask: Any, segment_ids: Any, cache: Any
) -> tuple[jax.Array, Sight, jax.Array, Any]:
    """(positions i32 [b, s], who sees whom, seen bool [b, t], the column where this call begins).

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
    own = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    ids = seen.astype(jnp.int32) if segment_ids is None else jnp.where(seen, own, -1)
    sight = Sight(own, ids, jnp.asarray(index, jnp.int32), packed=segment_ids is not None)
    return positions, sight, seen, index


def attended(
    q: jax.Array, keys: jax.Array, values: jax.Array, kv: Any, sight: Sight, scale: float | None = None
) -> tuple[jax.Array, Any]:
    """(attention [b, s, h, k], what is new of the cache or None) of a layer's queries [b, s, h, k] and keys and values
    [b, s, g, k], after those of its cache `kv`, if there is one."""
    if kv is None:
        return attend(q, keys, values, sight, scale), None
    new = tuple(turned(x).astype(old.dtype) for x, old in zip((keys, values), kv, strict=True))
    if q.shape[1] == 1:
        return last(q, kv, new, sight, q.shape[-1] ** -0.5 if scale is None else scale), new
    keys, values = map(turned, written(kv, new, sight.index))
    return attend(q, keys, values, sight, scale), new


def turned(x: jax.Array) -> jax.Array:
    """A cache's order of axes [b, g, t, k] of [b, t, g, k], and back."""
    return jnp.swapaxes(x, 1, 2)


def last(q: jax.Array, kv: Any, new: Any, sight: Sight, scale: float) -> jax.Array:
    """Attention of one token's queries [b, 1, h, k] over keys and values of a cache [b, g, t, k] and its own column
    [b, g, 1, k], apart from each other: together, the cache would have to be copied."""
    (keys, values), (key, value) = (jax.tree.map(lambda x: x.astype(q.dtype), pair) for pair in (kv, new))
    groups = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[-1])
    score = lambda x: jnp.einsum("bgrk,bgtk->bgrt", groups, x).astype(jnp.float32) * scale
    before = sight.dense() & (jnp.arange(keys.shape[2]) != sight.index)
    scores = jnp.where(before[:, None], score(keys), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(jnp.concatenate([scores, score(key)], axis=-1), axis=-1).astype(q.dtype)
    out = jnp.einsum("bgrt,bgtk->bgrk", weights[..., :-1], values)
    return (out + weights[..., -1:] * value).reshape(q.shape)


def written(kv: Any, new: Any, index: Any) -> Any:
    """Keys and values [..., b, g, t, k] with the `new` ones [..., b, g, s, k] at column `index`. Of layers that are
    scanned they are written together, once: a scan that gave back whole caches would copy them at every token."""
    put = lambda old, x: jax.lax.dynamic_update_slice(old, x, (*(0,) * (old.ndim - 2), index, 0))
    return jax.tree.map(put, kv, new)


def to_length(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x with `size` of an axis: its first ones, or zeros after all of them."""
    axis %= x.ndim
    if x.shape[axis] >= size:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])
