"""The cache of every slot, and the functions that are compiled: read prompts, seat them in slots, advance all slots.

Any decoder with `init_cache` works: its cache of one row is mapped over the slots, so each has its own length. All
slots have room for as many tokens as the longest needs at present, a power of two: attention over empty room, and
carrying it through the layers, would cost more than the weights do.
Axes: b slots, w prompts read together, p a prompt padded on the right to a bucket, t the cache's length, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.bank import with_rows
from jlora.models.attention import attending, fitting
from jlora.models.causal import to_length
from jlora.serve.sample import Sampling, draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What lives between steps: the cache, the last token i32 [b] of each slot and how many it has written i32 [b]."""

    cache: Any
    token: Any
    written: Any


@functools.lru_cache
def cache_axes(model: Any) -> tuple[Any, Any]:
    """(axis of rows, axis of tokens) in each leaf of the cache, -1 where it has none: where other sizes differ."""
    shapes = lambda rows, size: jax.eval_shape(lambda: model.init_cache(rows, size))
    differ = lambda x, y: next((n for n, (i, j) in enumerate(zip(x.shape, y.shape, strict=True)) if i != j), -1)
    one = shapes(1, 8)
    return jax.tree.map(differ, one, shapes(2, 8)), jax.tree.map(differ, one, shapes(1, 9))


def empty(model: Any, count: int, size: int) -> Slots:
    """`count` slots for `size` tokens each."""
    # an array each: keys and values may start as the same one, and what is donated must not be given twice
    grow = lambda x, axis: jnp.zeros((count, *x.shape) if axis < 0 else x.shape, x.dtype)
    cache = jax.tree.map(grow, model.init_cache(count, size), cache_axes(model)[0])
    return Slots(cache, jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 2))
def resized(model: Any, slots: Slots, size: int) -> Slots:
    """The slots with room for `size` tokens each; what they hold must fit."""
    rows, columns = cache_axes(model)
    cut = lambda x, row, column: x if column < 0 else to_length(x, column + (row < 0), size)
    return dataclasses.replace(slots, cache=jax.tree.map(cut, slots.cache, rows, columns))


def apply_hidden(model: Any, params: Any, tokens: jax.Array, mask: Any, cache: Any) -> Any:
    options = {"mask": mask, "cache": cache, "method": "hidden"}
    return jlora.lift(model.apply, strict=True)({"params": params}, tokens, **options)


def head(model: Any, params: Any, hidden: jax.Array) -> jax.Array:
    return jlora.lift(model.apply, strict=True)({"params": params}, hidden, method="head")


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    model: Any, params: Any, bank: Any, tokens: jax.Array, counts: jax.Array, rows: jax.Array, how: Sampling
) -> tuple[jax.Array, Any]:
    """(first new tokens i32 [w], cache of p tokens): prompts i32 [w, p], of counts i32 [w] real tokens each.

    rows i32 [w]: the adapters' places in the bank. What padding leaves in the cache is masked, and written over.
    """
    params = jlora.combine(params, with_rows(bank, rows))
    width, length = tokens.shape
    mask = jnp.arange(length) < counts[:, None]
    with attending(fitting("any")):
        hidden, cache = apply_hidden(model, params, tokens, mask, model.init_cache(width, length))
    last = hidden[jnp.arange(width), jnp.maximum(counts - 1, 0)]
    return draw(head(model, params, last), how, jnp.zeros(width, jnp.int32)), {**cache, "index": counts}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def seat(model: Any, slots: Slots, new: jax.Array, cache: Any, places: jax.Array) -> Slots:
    """The slots with what `prefill` gave in the slots `places` i32 [w]; a row whose place is no slot is dropped."""
    rows, columns = cache_axes(model)

    def put(old: jax.Array, read: jax.Array, row: int, column: int) -> jax.Array:
        read = read if column < 0 else to_length(read, column, old.shape[column])
        return old.at[(slice(None),) * max(row, 0) + (places,)].set(read.astype(old.dtype), mode="drop")

    cache = jax.tree.map(put, slots.cache, cache, rows, columns)
    token = slots.token.at[places].set(new, mode="drop")
    return Slots(cache, token, slots.written.at[places].set(1, mode="drop"))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def decode(
    model: Any, steps: int, params: Any, bank: Any, slots: Slots, active: jax.Array, rows: jax.Array, how: Sampling
) -> tuple[jax.Array, Slots]:
    """(new tokens i32 [steps, b], slots): `steps` tokens more where `active` [b]; the other slots stay as they are."""
    axes = cache_axes(model)[0]
    places = jax.tree.map(lambda axis: max(axis, 0), axes)

    def one(cache: Any, token: jax.Array, row: jax.Array) -> Any:
        cache = jax.tree.map(lambda x, axis: x if axis < 0 else jnp.expand_dims(x, axis), cache, axes)
        full = jlora.combine(params, with_rows(bank, row[None]))
        hidden, cache = apply_hidden(model, full, token[None, None], None, cache)
        cache = jax.tree.map(lambda x, axis: x if axis < 0 else jnp.squeeze(x, axis), cache, axes)
        return head(model, full, hidden[:, -1])[0], cache

    def step(slots: Slots, _: None) -> tuple[Slots, jax.Array]:
        logits, cache = jax.vmap(one, in_axes=(places, 0, 0), out_axes=(0, places))(slots.cache, slots.token, rows)
        cache = {**cache, "index": jnp.where(active, cache["index"], slots.cache["index"])}
        new = draw(logits, how, slots.written)
        return Slots(cache, jnp.where(active, new, slots.token), slots.written + active), new

    if steps == 1:
        slots, new = step(slots, None)
        return new[None], slots
    slots, new = jax.lax.scan(step, slots, None, length=steps)
    return new, slots
