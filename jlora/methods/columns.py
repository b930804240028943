"""A model that reads its prefix by itself: n columns before every row, which nothing outside needs to know of.

`prefix` makes the trained entries; `reading` looks them up and wraps the model, so that losses, label positions, heads
and generation (greedy, sampled, beams) are those of the model without a prefix.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.leaves import RANK
from jlora.lora import Together
from jlora.methods.plant import entries_of, leaves_of
from jlora.methods.prefix import PrefixLayer, PrefixRows, columns
from jlora.methods.prefix_kv import NAME, KeptColumns


@dataclasses.dataclass(frozen=True)
class Prefixed:
    """`model` (Flax Linen, with a method `hidden`) with `n` columns before its tokens, their hidden states dropped.

    The columns' ids are first_id, first_id + step, ...; with a cache they are read with the first tokens only.
    """

    model: Any
    n: int
    first_id: int
    step: int

    def init_cache(self, batch: int, size: int) -> dict[str, Any]:
        """An empty cache for `size` tokens and the columns; the first call gives back the model's own."""
        return {"empty": self.model.init_cache(batch, size + self.n)}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's. Raises ValueError for packed examples, which would share one prefix."""
        with nn.intercept_methods(self.widen):
            return self.model.apply(variables, *args, **kwargs)

    def widen(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        cache = kwargs.get("cache")
        own = context.method_name == "hidden" and isinstance(context.module, type(self.model))
        if not own or (cache is not None and "empty" not in cache):
            return call(*args, **kwargs)
        refuse_packed(kwargs)
        (tokens,), options = args, dict(kwargs)
        tokens, options["mask"] = columns(tokens, options.get("mask"), self.n, self.first_id)
        if not self.step:
            tokens = tokens.at[:, : self.n].set(self.first_id)
        if (types := options.get("token_type_ids")) is not None:
            options["token_type_ids"] = jnp.pad(types, ((0, 0), (self.n, 0)))
        if cache is None:
            return call(tokens, **options)[:, self.n :]
        hidden, cache = call(tokens, **{**options, "cache": cache["empty"]})
        return hidden[:, self.n :], cache


@dataclasses.dataclass(frozen=True)
class Filled:
    """A decoder whose cache holds `n` trained columns before it reads anything (`prefix_kv`)."""

    model: Any
    n: int

    def init_cache(self, batch: int, size: int) -> dict[str, Any]:
        """As `Prefixed.init_cache`."""
        return {"empty": self.model.init_cache(batch, size + self.n)}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's. Raises ValueError for packed examples, which would share one prefix."""
        params = dict(variables["params"])
        kept = params.pop(NAME)
        with nn.intercept_methods(functools.partial(self.widen, kept)):
            return self.model.apply({**variables, "params": params}, *args, **kwargs)

    def widen(self, kept: Any, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        cache = kwargs.get("cache")
        own = context.method_name == "hidden" and isinstance(context.module, type(self.model))
        if not own or (cache is not None and "empty" not in cache):
            return call(*args, **kwargs)
        refuse_packed(kwargs)
        (tokens,) = args
        room = self.model.init_cache(tokens.shape[0], tokens.shape[1] + self.n) if cache is None else cache["empty"]

        def put(old: jax.Array, columns: jax.Array) -> jax.Array:
            columns = columns.reshape(self.n, -1, old.shape[-1]).astype(old.dtype)  # of a layer: [n, g, k]
            return old.at[:, :, : self.n].set(jnp.swapaxes(columns, 0, 1))

        def all_layers(old: Any, columns: jax.Array) -> Any:
            return tuple(map(put, old, columns)) if isinstance(old, tuple) else jax.vmap(put)(old, columns)

        kv = tuple(all_layers(old, kept[name]) for old, name in zip(room["kv"], ("keys", "values"), strict=True))
        full = {**room, "kv": kv, "mask": room["mask"].at[:, : self.n].set(True), "index": room["index"] + self.n}
        hidden, grown = call(tokens, **{**kwargs, "cache": full})
        return hidden if cache is None else (hidden, grown)


def refuse_packed(options: Any) -> None:
    if options.get("segment_ids") is not None or options.get("positions") is not None:
        raise ValueError("packed examples cannot have virtual tokens: give each its own row (packing off)")


def reading(model: Any, frozen: Any, trained: Any) -> Any:
    """`model` as it must be run with the prefixes of `trained`: `Prefixed`, `Filled`, or itself where there are none.

    Raises ValueError where prefixes of several kinds do not go together, or for keys and values without a cache.
    """
    trees = trained.trees if isinstance(trained, Together) else (trained,)
    found = [(path, entry) for tree in trees for path, entry in entries_of(tree).items()]
    rows = {path: entry for path, entry in found if isinstance(entry, PrefixRows)}
    layers = [entry for _, entry in found if isinstance(entry, PrefixLayer)]
    kept = [entry.keys.shape[1] for _, entry in found if isinstance(entry, KeptColumns)]
    if kept and (rows or layers or len(kept) > 1 or not hasattr(model, "init_cache")):
        raise ValueError("keys and values of a prefix need a decoder, with no other prefix beside them")
    if kept:
        return Filled(model, kept[0])
    sizes = {jax.eval_shape(entry.settled).rows.shape[0] - entry.infix for entry in rows.values()}
    sizes |= {entry.prefix.shape[entry.axes.index(RANK)] for entry in layers}
    if not sizes or sizes == {0}:
        return model
    if len(sizes) > 1 or len(rows) > 1:
        raise ValueError(f"prefixes of {sorted(sizes)} columns in one model: they must be of one length")
    if not rows:
        return Prefixed(model, sizes.pop(), 0, 0)
    (path,) = rows
    return Prefixed(model, sizes.pop(), leaves_of(frozen)[path].shape[0], 1)
