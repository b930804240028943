"""What models share: a stack of layers and the tied head; of decoders positions, masks and the cache.

Axes: b batch, s sequence, t keys (the cache's length, or s), h query heads, g key heads, k head size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from jlora.models.attention import Sight, attend

INPUT = "layer input"


def layer_input(x: jax.Array) -> jax.Array:
    """x, under the name that `stacked` knows it by."""
    return checkpoint_name(x, INPUT)


def refuse_others(hub: Mapping[str, Any], only: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a field of a `config.json` that is not what `only` says; null stands for False and None
    alone."""
    for name, value in only.items():
        given = hub.get(name, value)
        if given != value and (given is not None or value):
            raise ValueError(f"{name} {given!r} is not supported in {where}: {value!r} is")


def check_causal(hub: Mapping[str, Any]) -> None:
    """Raises ValueError for a `config.json` that makes its decoder see what follows (transformers from 5.2 on)."""
    refuse_others(hub, {"is_causal": True}, "a decoder")


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


def empty_cache(layers: int, batch: int, size: int, heads: int, width: int, dtype: Any, scan: bool) -> dict[str, Any]:
    """A cache for `size` tokens in each of `batch` rows: keys and values, which of them are real, how many there are.

    Keys, and values, are [l, b, g, t, k] for layers that are scanned, else a tuple of [b, g, t, k], one a layer: the
    columns of a head lie together, as the products with them want it.
    """
    shape = (batch, heads, size, width)
    one = lambda: jnp.zeros((layers, *shape), dtype) if scan else tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    return {"kv": (one(), one()), "mask": jnp.zeros((batch, size), bool), "index": jnp.zeros((), jnp.int32)}


def to_length(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x with `size` of an axis: its first ones, or zeros after all of them."""
    axis %= x.ndim
    if x.shape[axis] >= size:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])


def stacked(block: Any, fields: tuple[Any, ...], layers: int, shared: int, scan: bool, remat: bool | str) -> Any:
    """The layers of a model, to be set as an attribute in `setup` and run by `through`.

    `shared`: how many arguments all layers get alike. scan: one module over a stack of parameters, else a list of
    them. remat: False, True (keep nothing of a layer but its input), "dots" (keep products with weights too) or
    "offload" (keep the input, as `layer_input` names it, in the host's memory). Raises ValueError for another.
    """
    kind = lifted_block(block, layers, shared, scan, remat)
    return kind(*fields) if scan else [kind(*fields) for _ in range(layers)]


@functools.cache  # Flax changes the block's class while it derives one, which another thread may be tracing
def lifted_block(block: Any, layers: int, shared: int, scan: bool, remat: bool | str) -> Any:
    """The class of a layer under remat, or of all of them under scan."""
    if remat not in (False, True, "dots", "offload"):
        raise ValueError(f"remat {remat!r} is not known: False, True, 'dots' or 'offload'")
    if remat:
        policies = jax.checkpoint_policies
        offload = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        policy = {"dots": policies.dots_with_no_batch_dims_saveable, "offload": offload}.get(str(remat))
        block = nn.remat(block, prevent_cse=not scan, policy=policy)
    if not scan:
        return block
    axes: Any = (0, *([nn.broadcast] * shared))
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=axes, length=layers)


def through(layers: Any, x: jax.Array, own: Any, *shared: Any) -> tuple[jax.Array, Any]:
    """(x, new keys and values in the cache's form, or None) after all layers. own: None, or a tuple of what each layer
    has for itself: arrays with a leading axis of layers, or tuples of one a layer."""
    if not isinstance(layers, list | tuple):
        return layers(x, own, *shared)
    new = []
    for n, layer in enumerate(layers):
        x, one = layer(x, None if own is None else tuple(every[n] for every in own), *shared)
        new.append(one)
    return x, None if new[0] is None else tuple(zip(*new, strict=True))


def tied_head(words: nn.Embed, hidden: jax.Array) -> jax.Array:
    """hidden [..., d] -> logits f32 [..., v], the head that shares the embedding of the tokens [v, d].

    `words.attend` turns the embedding round, which XLA for CPUs does by a copy of it where a loop is around the head.
    """
    hidden, table = promote_dtype(hidden, words.embedding, dtype=words.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table).astype(jnp.float32)
