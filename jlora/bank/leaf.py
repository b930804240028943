"""A weight with many low-rank differences, one for each row of the batch: y_b = x_b·W + (x_b·A_n)·B_n, n = rows[b].

Axes: n slots, r rank (of every slot: smaller ranks are padded with zeros, the same function), b rows of the batch.
Two forms of the product, both exact. "gather" takes each row's own factors and does a batched product (Punica's BGMV,
Chen et al. 2023, arXiv 2310.18547); "dense" takes the products with all slots at once and keeps each row's own, which
reads every slot but is one large matmul. "auto" takes dense for few slots and one token a row, as in decoding, where a
whole step of SmolLM2 took 0.85 of what it takes with gather, and else gather. experiments/serving/products.py compares
these and two more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jlora.following import FollowingLeaf, Product, spread
from jlora.leaves import RANK, contract
from jlora.lora import Adapter, axes_of

Method = Literal["auto", "gather", "dense"]
FEW = 16
"""Slots that "auto" multiplies by all at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BankLeaf(FollowingLeaf):
    """W, and in `beside`: a [*stack, n·r, *in], b [*stack, n·r, *out] (scaled), rows i32 [b] of slots in 0..n-1.

    The first axis of what is multiplied that W does not contract is taken to be b.
    """

    slots: int = dataclasses.field(default=1, metadata={"static": True})
    method: Method = dataclasses.field(default="auto", metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = FollowingLeaf.rules
    trainable: ClassVar[tuple[str, ...]] = ()

    def materialise(self) -> jax.Array:
        """Raises ValueError: rows with different adapters have no one weight."""
        raise ValueError(
            f"{self.path or 'a weight'} {list(self.shape)} is used by an operation that a bank of adapters has no "
            "product for, and rows with different adapters have no one weight: leave it out of the adapters' targets"
        )

    def after(self, y: Any, x: Any, product: Product) -> Any:
        """y + the difference of each row. Raises ValueError if x has not as many rows as there are indices."""
        rows = self.beside["rows"]
        a, b = ((self.beside[name], self.labels(name)) for name in ("a", "b"))
        first, second = (a, b) if set(product.summed) <= set(a[1]) else (b, a)
        if not set(product.summed) <= set(first[1]) or set(product.summed) & set(second[1]):
            return NotImplemented
        free = [label for label in product.x if label >= self.ndim]
        if not free:
            return NotImplemented
        size = x.shape[product.x.index(free[0])]
        if size != rows.shape[0]:
            raise ValueError(f"{self.path}: {rows.shape[0]} adapter indices for a batch of {size} rows {list(x.shape)}")
        middle = (*(label for label in product.x if label in product.out), RANK)
        middle = (free[0], *(label for label in middle if label != free[0]))
        one = math.prod(n for n, label in zip(x.shape, product.x, strict=True) if label in free[1:]) == 1
        if self.method == "dense" or (self.method == "auto" and one and self.slots <= FEW):
            h = contract(x, product.x, first[0].astype(x.dtype), first[1], middle)
            own = rows[:, None] == jnp.arange(self.slots)
            own = jnp.repeat(own, first[0].shape[first[1].index(RANK)] // self.slots, axis=1)
            # chosen, not multiplied by 0: another row's adapter may overflow
            h = jnp.where(spread(own, (free[0], RANK), middle), h, 0)
            return y + contract(h, middle, second[0].astype(x.dtype), second[1], product.out)
        (first_of, first_labels), (second_of, second_labels) = (
            self.picked(array, labels, rows, free[0]) for array, labels in (first, second)
        )
        h = contract(x, product.x, first_of.astype(x.dtype), first_labels, middle)
        return y + contract(h, middle, second_of.astype(x.dtype), second_labels, product.out)

    def picked(self, array: Any, labels: tuple[int, ...], rows: Any, row_label: int) -> tuple[Any, tuple[int, ...]]:
        """Each row's own part of a factor, [b, r, ...], and its labels."""
        at = labels.index(RANK)
        array = jnp.moveaxis(array, at, 0)
        array = array.reshape(self.slots, array.shape[0] // self.slots, *array.shape[1:])
        others = tuple(label for label in labels if label != RANK)
        return jnp.take(array, rows, axis=0, mode="clip"), (row_label, RANK, *others)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BankFactors(Adapter):
    """All slots' factors of one weight of layout `layout`: a [*stack, n·r, *in], b [*stack, n·r, *out], scaled.

    `rows`: i32 [b], the slot of each row of the batch; `with_rows` fills it.
    """

    a: Any
    b: Any
    rows: Any = None
    slots: int = dataclasses.field(default=1, metadata={"static": True})
    layout: str = dataclasses.field(default="io", metadata={"static": True})
    method: Method = dataclasses.field(default="auto", metadata={"static": True})

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> BankLeaf:
        """Raises ValueError without rows."""
        if self.rows is None:
            raise ValueError("a bank needs the slot of each row: bank.tree(names), or with_rows(tree, rows)")
        stack = axes_of(self.layout, "s")
        axes = (
            ("a", (*stack, RANK, *axes_of(self.layout, "i"))),
            ("b", (*stack, RANK, *axes_of(self.layout, "o"))),
            ("rows", (RANK,)),
        )
        beside = {"a": self.a, "b": self.b, "rows": self.rows}
        return BankLeaf(w, beside, axes, path, self.slots, self.method)

    def describe(self) -> str:
        return f"{self.slots - 1} adapters and none, axes {self.layout}"
