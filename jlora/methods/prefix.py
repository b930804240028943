"""Prefix tuning: trained vectors that the model reads before (or inside) its input (Li & Liang 2021, 2101.00190).

Embedding (PreEmbed of Hu et al., section 5.1; prompt tuning of Lester et al. 2021): ids past the vocabulary stand for
trained embeddings, before the prompt (prefix) or anywhere else (infix). d * n numbers train.
Layer (PreLayer): at the first n columns every layer's keys and values are made from trained activations, by the frozen
projections. L * d * n numbers train, as the paper counts them.
P-tuning's reparameterisation: the embeddings are a small network's outputs, which `settle` then keeps alone.

The model is not edited: the embedding answers for more ids than it has rows, and the products with the key and value
weights replace their input's first columns. Masks, positions and the cache are the model's own; the caller gives it n
more columns (`columns`) and drops their outputs (`with_prefix`). Departures: the trained activations of a layer stand
after its LayerNorm and start near zero (`prefix_kv` says why); infixes are of the embedding alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.following import FollowingLeaf, Product
from jlora.leaves import RANK, AroundLeaf, Labels, as_array, specs_of
from jlora.lora import Adapter, axes_of, leaf_key
from jlora.methods.plant import held, leaves_of, plant, replaced, within
from jlora.methods.points import POINTS, find, layout_of
from jlora.tree import module_of, slashed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LongerTable(AroundLeaf):
    """An embedding [v, d] that also answers for the ids v, v + 1, ... with `rows` [n, d]; else it is the embedding."""

    w: Any
    rows: Any
    path: str = dataclasses.field(default="", metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = {}
    trainable: ClassVar[tuple[str, ...]] = ("rows",)

    def materialise(self) -> jax.Array:
        return as_array(self.w)

    def shard_specs(self, spec: Any, exact: bool = True) -> Any:
        w = specs_of(self.w, spec, exact)
        return None if w is None else dataclasses.replace(self, w=w, rows=jax.sharding.PartitionSpec())


def lookup(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, index: Any) -> Any:
    """Whole rows by id (`jnp.take`, `table[ids]`): the trained ones where the id lies past the table."""
    dims = eqn.params["dimension_numbers"]
    whole = tuple(eqn.params["slice_sizes"]) == (1, leaf.shape[1])
    if position != 0 or not whole or dims.start_index_map != (0,) or dims.offset_dims != (index.ndim - 1,):
        return NotImplemented
    ids = index[..., 0]
    past = ids >= leaf.shape[0]
    found = bind(leaf.w, jnp.where(past[..., None], 0, index))
    rows = leaf.rows.astype(found.dtype)[jnp.clip(ids - leaf.shape[0], 0, len(leaf.rows) - 1)]
    return jnp.where(past[..., None], rows, found)


def passed(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    """A product (a tied head), a transpose: the extra rows take no part."""
    leaf = operands[position]
    return bind(*(leaf.w if n == position else x for n, x in enumerate(operands)))


def cast(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return dataclasses.replace(leaf, w=bind(leaf.w), rows=leaf.rows.astype(eqn.params["new_dtype"]))


LongerTable.rules.update({"gather": lookup, "convert_element_type": cast, "dot_general": passed, "transpose": passed})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixLeaf(FollowingLeaf):
    """A weight whose input's first n columns are replaced by trained ones, `beside["prefix"]` [s, n, i]."""

    rules: ClassVar[dict[str, Any]] = {k: v for k, v in FollowingLeaf.rules.items() if k != "broadcast_in_dim"}

    def before(self, x: Any, product: Product) -> Any:
        """Columns: the last axis of x that is not summed. An input no longer than the prefix is a step of a cache, and
        one without a batch axis a table of the model's own (DeBERTa's relative positions): both stay as they are.
        """
        prefix, labels = self.beside["prefix"], self.labels("prefix")
        inputs = tuple(ax for ax in labels if ax in product.summed)
        free = [n for n, ax in enumerate(product.x) if ax >= self.ndim]
        if set(product.summed) != set(inputs) or not inputs or not free:
            return NotImplemented
        at, n = free[-1], prefix.shape[labels.index(RANK)]
        if x.shape[at] <= n or len(free) == 1:
            return x
        wanted = tuple(RANK if m == at else ax for m, ax in enumerate(product.x))
        order = sorted(range(len(labels)), key=lambda m: wanted.index(labels[m]))
        there = jnp.expand_dims(jnp.transpose(prefix, order), [m for m, ax in enumerate(wanted) if ax not in labels])
        rest = jax.lax.slice_in_dim(x, n, x.shape[at], axis=at)
        there = jnp.broadcast_to(there.astype(x.dtype), (*x.shape[:at], n, *x.shape[at + 1 :]))
        return jnp.concatenate([there, rest], at)

    def materialise(self) -> jax.Array:
        raise ValueError(f"{self.path} {list(self.shape)} has a prefix, which is no weight: it cannot be merged")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixRows(Adapter):
    """Trained embeddings [n, d] for the ids past an embedding's last, as they are or as a network's outputs.

    network: {"first" [e, h], "second" [h, d]}: rows [n, e] go through tanh(rows · first) · second, or None.
    infix: how many of the rows, the last ones, are not put before the tokens but stand among them.
    """

    rows: Any
    network: Any = None
    infix: int = dataclasses.field(default=0, metadata={"static": True})

    mergeable: ClassVar[bool] = False

    def settled(self) -> PrefixRows:
        if self.network is None:
            return self
        first, second = self.network["first"], self.network["second"]
        return PrefixRows(jnp.tanh(self.rows @ first) @ second, None, self.infix)

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> LongerTable:
        return LongerTable(w, self.settled().rows, path)

    def describe(self) -> str:
        inside = f", {self.infix} of them inside the text" if self.infix else ""
        return f"{self.rows.shape[0]} virtual tokens{inside}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixLayer(Adapter):
    """Trained activations [s, n, i] from which the weights `names` of one module make their first n columns."""

    prefix: Any
    axes: Labels = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> Any:
        leaves, beside, axes = leaves_of(w), {"prefix": self.prefix}, (("prefix", self.axes),)
        return replaced(w, {n: PrefixLeaf(held(leaves, n, path), beside, axes, within(path, n)) for n in self.names})

    def describe(self) -> str:
        return f"{self.prefix.shape[-2]} columns of {', '.join(self.names)}"


def embedding(
    params: Any,
    n: int,
    *,
    table: str | None = None,
    like: Any = None,
    hidden: int | None = None,
    infix: int = 0,
    dtype: Any = jnp.float32,
    key: Any = None,
) -> tuple[Any, Any]:
    """(frozen, trained): n trained embeddings at the ids v .. v + n - 1 of the embedding [v, d] at path `table`.

    The first n - infix are the prefix; the last `infix` ids are for the caller to place in the text, after the prompt
    in the paper.

    table: found by its name if there is one embedding. like: i32 [n], ids whose embeddings they start as; rows drawn
    at random if not given. hidden: P-tuning's network of that width between (`settle` ends it).
    Raises ValueError for a `table` that is no embedding (or is not given, and there is not one alone), for no virtual
    token or more inside than there are, and for another number of ids in `like` or ids that the table has not.
    """
    leaves, key = leaves_of(params), jax.random.key(0) if key is None else key
    named = [p for p in leaves if p.endswith(("embed_tokens/embedding", "word_embeddings/embedding", "wte/embedding"))]
    table = table or (named[0] if len(named) == 1 else "")
    if table not in leaves or len(leaves[table].shape) != 2:
        raise ValueError(
            f"table={table!r} is no embedding [v, d]: name it by its path ({', '.join(list(leaves)[:4])}, ...)"
        )
    w = leaves[table]
    if n < 1 or not 0 <= infix <= n:
        raise ValueError(f"{n} virtual tokens, {infix} inside the text: at least 1, and of them at most all inside")
    if like is None:
        like = jax.random.choice(leaf_key(key, table), w.shape[0], (n,), replace=n > w.shape[0])
    else:
        check_ids(np.asarray(like), n, table, w.shape[0])
    dense = as_array(w)
    rows, network = dense[jnp.asarray(like)].astype(dtype), None
    if hidden:
        ones = jax.random.split(leaf_key(key, f"{table} network"))
        draw = lambda k, m, o: (jax.random.normal(k, (m, o)) / m**0.5).astype(dtype)
        network = {"first": draw(ones[0], w.shape[1], hidden), "second": draw(ones[1], hidden, w.shape[1])}
    return plant(params, {table: (w, PrefixRows(rows, network, infix))})


def check_ids(ids: np.ndarray, n: int, table: str, size: int) -> None:
    """Raises ValueError for what is not n ids of a table with `size` rows."""
    if ids.shape != (n,):
        raise ValueError(f"like is {list(ids.shape)}, and {n} virtual tokens start as one id each")
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.size:
        raise ValueError(f"like: ids of {table} lie in 0..{size - 1}: {wrong.tolist()}")


def layer(
    params: Any,
    n: int,
    *,
    layouts: Mapping[str, Any] | None = None,
    size: float = 0.02,
    dtype: Any = jnp.float32,
    key: Any = None,
) -> tuple[Any, Any]:
    """(frozen, trained): n trained columns for every attention's keys and values, drawn from N(0, size²).

    A fused weight (GPT-2's c_attn) makes their queries too, which nothing reads.
    Raises ValueError where key and value weights are not found side by side (`points.POINTS` names them).
    """
    leaves, key = leaves_of(params), jax.random.key(0) if key is None else key
    if n < 1:
        raise ValueError(f"{n} columns: at least 1 is needed")
    modules: dict[str, list[str]] = {}
    fused = any(re.search(POINTS["fused"], slashed(path)) for path in leaves)
    for path in find("fused" if fused else ("key", "value"), leaves, layouts, "points"):
        modules.setdefault(module_of(module_of(path)), []).append(path)
    made: dict[str, tuple[Any, Any]] = {}
    for module, found in modules.items():
        names = [path.removeprefix(module).lstrip("/.") for path in found]
        if len(names) != (1 if fused else 2):
            raise ValueError(f"{module} has {names}: a key's and a value's weight are needed side by side")
        w, layout = leaves[found[0]], layout_of(found[0], leaves[found[0]], layouts)
        stack, inputs = axes_of(layout, "s"), axes_of(layout, "i")
        shape = (*(w.shape[ax] for ax in stack), n, *(w.shape[ax] for ax in inputs))
        drawn = (size * jax.random.normal(leaf_key(key, module), shape)).astype(dtype)
        made[module] = (None, PrefixLayer(drawn, (*stack, RANK, *inputs), tuple(names)))
    return plant(params, made)


def settle(trained: Any) -> Any:
    """`trained` with every network of P-tuning replaced by its outputs: the same function, less to keep."""
    rows = lambda x: isinstance(x, PrefixRows)
    return jax.tree.map(lambda x: x.settled() if rows(x) else x, trained, is_leaf=rows)


def columns(tokens: jax.Array, mask: Any, n: int, first_id: int) -> tuple[jax.Array, jax.Array]:
    """(tokens [b, n + s], mask [b, n + s]): the ids first_id .. first_id + n - 1 before every row, all real.

    first_id: the vocabulary's size for `embedding`, for `layer` any id (its embedding is computed and not used).
    """
    head = jnp.broadcast_to(first_id + jnp.arange(n, dtype=tokens.dtype), (tokens.shape[0], n))
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    return jnp.concatenate([head, tokens], 1), jnp.concatenate([jnp.ones(head.shape, bool), mask], 1)


def with_prefix(apply: Callable[..., Any], n: int, first_id: int, *, step: int = 1) -> Callable[..., Any]:
    """`apply(params, tokens [b, s], mask) -> [b, s, ...]` with n more columns before, and their outputs dropped.

    step: 0 for a layer's prefix, whose ids are all `first_id`.
    """

    def run(params: Any, tokens: jax.Array, mask: Any = None) -> Any:
        tokens, mask = columns(tokens, mask, n, first_id)
        tokens = tokens if step else tokens.at[:, :n].set(first_id)
        return apply(params, tokens, mask)[:, n:]

    return run
