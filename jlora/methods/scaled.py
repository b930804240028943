"""A weight whose inputs or outputs are scaled: what IA3 and DoRA have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.following import FollowingLeaf, Product, spread
from jlora.leaves import Labels, unrounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledLeaf(FollowingLeaf):
    """W * scale, broadcast; taken as (x·W) * scale or (x * scale)·W, whichever axis the scale runs along."""

    def scale(self) -> tuple[jax.Array, Labels]:
        return self.beside["scale"], self.labels("scale")

    def before(self, x: Any, product: Product) -> Any:
        labels = self.labels(self.axes[0][0])
        if not set(labels) & set(product.summed):
            return x
        if not set(labels) <= set(product.x):
            return NotImplemented
        scale, labels = self.scale()
        return x * spread(scale, labels, product.x).astype(x.dtype)

    def after(self, y: Any, x: Any, product: Product) -> Any:
        if set(self.labels(self.axes[0][0])) & set(product.summed):
            return y
        scale, labels = self.scale()
        return y * spread(scale, labels, product.out).astype(y.dtype)

    def unrounded(self) -> jax.Array:
        scale, labels = self.scale()
        return unrounded(self.w) * spread(scale, labels, tuple(range(self.ndim)))

    def materialise(self) -> jax.Array:
        return self.unrounded().astype(self.dtype)
