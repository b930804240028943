"""Leaves that stand around a weight with arrays beside it: what they share, whatever they do with the product.

The arrays are kept in step with the weight as LoRA's factors are. A method then only says what becomes of a product
(`before` and `after`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.leaves import LabelledLeaf, Labels
from jlora.rules_structure import STRUCTURE


class Product(NamedTuple):
    """The labels of a product's operand and result, ndim + n for axis n of the operand, and the axes that it sums."""

    x: Labels
    out: Labels
    summed: Labels


@dataclasses.dataclass(frozen=True)
class FollowingLeaf(LabelledLeaf):
    """A weight, and what is done around it. Subclasses register as dataclass pytrees.

    `w`: the weight, an array or another leaf. `beside`: arrays by name, or None; `axes`: (name, labels) of each.
    """

    w: Any
    beside: dict[str, Any]
    axes: tuple[tuple[str, Labels], ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = {}
    trainable: ClassVar[tuple[str, ...]] = ("beside",)

    def labels(self, name: str) -> Labels:
        return dict(self.axes)[name]

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


PRODUCTS = {"dot_general": around(dot_product), "conv_general_dilated": around(conv_product)}
FollowingLeaf.rules.update(STRUCTURE | PRODUCTS)
