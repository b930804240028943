"""The cache of every slot, and the two functions that are compiled: read a prompt into a slot, advance all slots.

Any decoder with `init_cache` works: its cache of one row is mapped over the slots, so each has its own length.
Axes: b slots, p a prompt padded on the right to a bucket, t the cache's length, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.bank import with_rows
from jlora.serve.sample import Sampling, draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What lives between steps: the cache, the last token i32 [b] of each slot and how many it has written i32 [b]."""

    cache: Any
    token: Any
    written: Any


def cache_axes(model: Any, size: int) -> Any:
    """The axis of slots in each leaf of the cache: where caches of 1 and 2 rows differ, else a new first axis."""
    one, two = (jax.eval_shape(lambda n=n: model.init_cache(n, size)) for n in (1, 2))
    return jax.tree.map(
        lambda x, y: next((n for n, (i, j) in enumerate(zip(x.shape, y.shape, strict=True)) if i != j), -1), one, two
    )


def empty(model: Any, count: int, size: int) -> Slots:
    """`count` slots for `size` tokens each."""
    # an array each: keys and values may start as the same one, and what is donated must not be given twice
    grow = lambda x, axis: jnp.zeros((count, *x.shape) if axis < 0 else x.shape, x.dtype)
    cache = jax.tree.map(grow, model.init_cache(count, size), cache_axes(model, size))
    return Slots(cache, jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32))


def apply_hidden(model: Any, params: Any, tokens: jax.Array, mask: Any, cache: Any) -> Any:
    return jlora.lift(model.apply, strict=True)({"params": params}, tokens, mask=mask, cache=cache, method="hidden")


def head(model: Any, params: Any, hidden: jax.Array) -> jax.Array:
    return jlora.lift(model.apply, strict=True)({"params": params}, hidden, method="head")


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def prefill(
    model: Any,
    size: int,
    params: Any,
    bank: Any,
    slots: Slots,
    tokens: jax.Array,
    count: jax.Array,
    slot: jax.Array,
    row: jax.Array,
    how: Sampling,
) -> tuple[jax.Array, Slots]:
    """(the first new token i32 [1], slots): a prompt i32 [1, p] of `count` real tokens read into `slot`.

    row i32 [1]: the adapter's place in the bank. What the padding left in the cache is masked, and written over.
    """
    params = jlora.combine(params, with_rows(bank, row))
    mask = jnp.arange(tokens.shape[1])[None] < count
    hidden, cache = apply_hidden(model, params, tokens, mask, model.init_cache(1, size))
    cache = {**cache, "index": count.astype(cache["index"].dtype)}
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, 1, keepdims=False)
    new = draw(head(model, params, last), how, jnp.zeros(1, jnp.int32))

    def put(old: jax.Array, one: jax.Array, axis: int) -> jax.Array:
        one = one[None] if axis < 0 else one
        return jax.lax.dynamic_update_slice_in_dim(old, one, slot, max(axis, 0))

    cache = jax.tree.map(put, slots.cache, cache, cache_axes(model, size))
    return new, Slots(cache, slots.token.at[slot].set(new[0]), slots.written.at[slot].set(1))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def decode(
    model: Any, size: int, params: Any, bank: Any, slots: Slots, active: jax.Array, rows: jax.Array, how: Sampling
) -> tuple[jax.Array, Slots]:
    """(new tokens i32 [b], slots): one token more in each slot where `active` [b]; the others stay as they are."""
    axes = cache_axes(model, size)

    def one(cache: Any, token: jax.Array, row: jax.Array) -> Any:
        cache = jax.tree.map(lambda x, axis: x if axis < 0 else jnp.expand_dims(x, axis), cache, axes)
        full = jlora.combine(params, with_rows(bank, row[None]))
        hidden, cache = apply_hidden(model, full, token[None, None], None, cache)
        cache = jax.tree.map(lambda x, axis: x if axis < 0 else jnp.squeeze(x, axis), cache, axes)
        return head(model, full, hidden[:, -1])[0], cache

    places = jax.tree.map(lambda axis: max(axis, 0), axes)
    logits, cache = jax.vmap(one, in_axes=(places, 0, 0), out_axes=(0, places))(slots.cache, slots.token, rows)
    cache = {**cache, "index": jnp.where(active, cache["index"], slots.cache["index"])}
    new = draw(logits, how, slots.written)
    return new, Slots(cache, jnp.where(active, new, slots.token), slots.written + active)
