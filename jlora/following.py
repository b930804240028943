"""Leaves that stand around a weight with arrays beside it: what they share, whatever they do with the product.

`FollowingLeaf` keeps the arrays in step with the weight through transposes, reshapes, slices and scans, by the rules
that `LoraLeaf` uses for its factors. A method then only says what becomes of a product (`before` and `after`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.leaves import RANK, ImplicitLeaf, LoraLeaf, is_implicit
from jlora.rules_structure import reshape_part

Labels = tuple[int, ...]
"""An axis each: n >= 0 for axis n of the weight, `RANK` for an axis of the array's own; in a product, ndim + n for
axis n of the operand."""


class Product(NamedTuple):
    """The labels of a product's operand and result, and the weight's axes that it sums."""

    x: Labels
    out: Labels
    summed: Labels


@dataclasses.dataclass(frozen=True)
class FollowingLeaf(ImplicitLeaf):
    """A weight, and what is done around it. Subclasses register as dataclass pytrees.

    `w`: the weight, an array or another leaf. `beside`: arrays by name, or None; `axes`: (name, labels) of each.
    """

    w: Any
    beside: dict[str, Any]
    axes: tuple[tuple[str, Labels], ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = {}
    trainable: ClassVar[tuple[str, ...]] = ("beside",)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    def labels(self, name: str) -> Labels:
        return dict(self.axes)[name]

    def allows_cut(self, axis: int) -> bool:
        """Whether the leaf of some rows along `axis` is these rows of the leaf."""
        return True

    def before(self, x: Any, product: Product) -> Any:
        """What is multiplied by the weight in place of x, or NotImplemented."""
        return x

    def after(self, y: Any, x: Any, product: Product) -> Any:
        """What becomes of the product y of x with the weight, or NotImplemented."""
        return y

    def with_parts(self, w: Any, parts: dict[str, tuple[Any, Labels]]) -> Any:
        return dataclasses.replace(
            self,
            w=w,
            beside={name: array for name, (array, _) in parts.items()},
            axes=tuple((name, labels) for name, (_, labels) in parts.items()),
        )

    def parts(self) -> dict[str, tuple[Any, Labels]]:
        return {name: (self.beside[name], labels) for name, labels in self.axes}

    def map_parts(self, on_w: Any, on_factor: Callable[[Any, Labels], Any], rename: Callable[[int], int | None]) -> Any:
        """As `LoraLeaf.map_parts`, for the arrays of `beside`."""

        def part(array: Any, labels: Labels) -> tuple[Any, Labels]:
            named = [ax if ax == RANK else rename(ax) for ax in labels]
            return on_factor(array, labels), tuple(ax for ax in named if ax is not None)

        return self.with_parts(on_w, {name: part(*held) for name, held in self.parts().items()})

    def unstack(self) -> tuple[Any, Callable[[Any], Any]]:
        if not self.allows_cut(0):
            return self.materialise(), lambda row: row
        w, rebuild_w = self.w.unstack() if is_implicit(self.w) else (self.w, lambda row: row)
        parts = self.parts()
        stacked = {name: jnp.moveaxis(a, at.index(0), 0) for name, (a, at) in parts.items() if 0 in at}

        def rebuild(row: Any) -> Any:
            w_row, rows = row
            lower = lambda labels: tuple(ax if ax == RANK else ax - 1 for ax in labels if ax != 0)
            return self.with_parts(
                rebuild_w(w_row), {name: (rows.get(name, a), lower(labels)) for name, (a, labels) in parts.items()}
            )

        return (w, stacked), rebuild

    def shard_specs(self, spec: Any, exact: bool = True) -> Any:
        full = tuple(spec) + (None,) * (self.ndim - len(spec))
        if any(full[ax] is not None and not self.allows_cut(ax) for ax in range(self.ndim)):
            return None
        w = self.w.shard_specs(spec, exact) if is_implicit(self.w) else spec
        of = lambda labels: jax.sharding.PartitionSpec(*(None if ax == RANK else full[ax] for ax in labels))
        beside = {name: of(labels) for name, labels in self.axes}
        return None if w is None else dataclasses.replace(self, w=w, beside=beside)


def spread(array: Any, labels: Labels, out: Labels) -> jax.Array:
    """`array` transposed and given axes of size 1 so that it broadcasts against an array labelled `out`."""
    order = sorted(range(len(labels)), key=lambda n: out.index(labels[n]))
    array = lax.transpose(array, order) if list(order) != list(range(len(labels))) else array
    return lax.expand_dims(array, [n for n, ax in enumerate(out) if ax not in labels])


# ---------------------------------------------------------------- rules


def around(product_of: Callable[[Any, FollowingLeaf, int, Any], Product | None]) -> Callable[..., Any]:
    """The rule of a product: `before` on its operand, the product itself, `after` on its result."""

    def rule(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
        leaf, x = operands[position], operands[1 - position]
        product = product_of(eqn, leaf, position, x)
        if product is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return NotImplemented
        x = leaf.before(x, product)
        if x is NotImplemented:
            return NotImplemented
        y = bind(leaf.w, x) if position == 0 else bind(x, leaf.w)
        out = leaf.after(y, x, product)
        return out if out is NotImplemented else out.astype(y.dtype)

    return rule


def dot_product(eqn: Any, leaf: FollowingLeaf, position: int, x: Any) -> Product:
    summed, batch = eqn.params["dimension_numbers"]
    w_sum, x_sum, w_batch, x_batch = summed[position], summed[1 - position], batch[position], batch[1 - position]
    shared = dict(zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True))
    x_labels = tuple(shared.get(n, leaf.ndim + n) for n in range(x.ndim))
    x_free = tuple(ax for ax in x_labels if ax >= leaf.ndim)
    w_free = tuple(n for n in range(leaf.ndim) if n not in w_sum and n not in w_batch)
    out = tuple(w_batch) + (w_free + x_free if position == 0 else x_free + w_free)
    return Product(x_labels, out, tuple(w_sum))


def conv_product(eqn: Any, leaf: FollowingLeaf, position: int, x: Any) -> Product | None:
    params = eqn.params
    if position != 1 or params["batch_group_count"] != 1 or params["feature_group_count"] != 1:
        return None
    dims = params["dimension_numbers"]
    out_ax, in_ax, *window = dims.rhs_spec
    label = lambda spec, feature: tuple(feature if n == spec[1] else leaf.ndim + n for n in range(x.ndim))
    return Product(label(dims.lhs_spec, in_ax), label(dims.out_spec, out_ax), (in_ax, *window))


def structural(name: str) -> Callable[..., Any]:
    rule = LoraLeaf.rules[name]

    def guarded(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
        leaf = operands[position]
        if name in ("slice", "dynamic_slice", "split") and position == 0:
            sizes = eqn.outvars[0].aval.shape
            if not all(sizes[ax] == leaf.shape[ax] or leaf.allows_cut(ax) for ax in range(leaf.ndim)):
                return NotImplemented
        return rule(eqn, bind, position, *operands)

    return guarded


def reshape(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, *dynamic: Any) -> Any:
    new = tuple(eqn.params["new_sizes"])
    if dynamic or eqn.params["dimensions"] is not None:
        return NotImplemented
    parts = {name: reshape_part(array, labels, leaf.shape, new) for name, (array, labels) in leaf.parts().items()}
    if any(part is None for part in parts.values()):
        return NotImplemented
    w = bind(leaf.w)
    # an adapted weight inside that has no such reshape was written out, and is no part to follow
    return NotImplemented if is_implicit(leaf.w) and not is_implicit(w) else leaf.with_parts(w, parts)


OWN = {"dot_general", "conv_general_dilated", "gather", "reshape"}
STRUCTURE = {name: structural(name) for name in LoraLeaf.rules if name not in OWN} | {"reshape": reshape}
PRODUCTS = {"dot_general": around(dot_product), "conv_general_dilated": around(conv_product)}
FollowingLeaf.rules.update(STRUCTURE | PRODUCTS)
