"""DoRA: a weight's directions by LoRA, its column norms trained beside them (Liu et al. 2024, arXiv 2402.09353).

W' = m * V / ||V||, V = W + scaling * A·B, the norm over the inputs of each output; m starts at ||W||.
The product is (m / ||V||) * (x·W + scaling * (x·A)·B). ||V||² is ||W||² + 2 scaling <W, A·B> + scaling² ||A·B||², each
term by products with A and B in turn, so A·B is never built. The norm is a constant to the gradient (section 4.3).
Departure: dropout touches the input of A alone; the released code drops it on the rescaled W too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jlora.leaves import RANK, Labels, LoraLeaf, as_array, contract, is_implicit
from jlora.lora import Adapter, LoraFactors, axes_of, is_adapter, lorafy
from jlora.methods.scaled import ScaledLeaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoraLeaf(ScaledLeaf):
    """m * V / ||V||; `w` is the `LoraLeaf` V, `beside` holds the magnitude m along the stack's and outputs' axes."""

    # broadcast, the weight would count several times in its norm
    rules: ClassVar[dict[str, Any]] = {k: v for k, v in ScaledLeaf.rules.items() if k != "broadcast_in_dim"}

    def allows_cut(self, axis: int) -> bool:
        return axis in self.labels("magnitude")

    def scale(self) -> tuple[jax.Array, Labels]:
        labels = self.labels("magnitude")
        size = lax.stop_gradient(norm(self.w, labels))
        # a column of zeros begins at magnitude 0, and 0 / 0 would be no start
        return self.beside["magnitude"] / jnp.where(size > 0, size, 1.0), labels


def norm(leaf: LoraLeaf, kept: Labels) -> jax.Array:
    """||W + scaling * A·B|| over the axes that are not `kept`, in float32."""
    if is_implicit(leaf.w) and 0 in kept and 0 in leaf.a_axes and 0 in leaf.b_axes:  # one matrix of a stack at a time
        parted = leaf.unstack()
        if parted is not None:
            rows, rebuild = parted
            return lax.map(lambda row: norm(rebuild(row), tuple(ax - 1 for ax in kept if ax)), rows)
    w = as_array(leaf.w).astype(jnp.float32)
    a, b = leaf.lora_a.astype(jnp.float32), leaf.lora_b.astype(jnp.float32)
    every = tuple(range(leaf.ndim))
    other = RANK - 1  # the second of two rank axes
    second = lambda axes: tuple(other if ax == RANK else ax for ax in axes)
    square = jnp.sum(w * w, axis=tuple(ax for ax in every if ax not in kept))
    exact = {"precision": "highest"}
    aw = contract(a, leaf.a_axes, w, every, (*kept, RANK), **exact)
    cross = contract(aw, (*kept, RANK), b, leaf.b_axes, kept, **exact)
    stack = tuple(ax for ax in leaf.a_axes if ax in kept)
    aa = contract(a, leaf.a_axes, a, second(leaf.a_axes), (*stack, RANK, other), **exact)
    aab = contract(aa, (*stack, RANK, other), b, second(leaf.b_axes), (*kept, RANK), **exact)
    own = contract(aab, (*kept, RANK), b, leaf.b_axes, kept, **exact)
    return jnp.sqrt(square + 2 * leaf.scaling * cross + leaf.scaling**2 * own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoraFactors(Adapter):
    """The factors of one weight and its magnitude: the stack's and outputs' axes in the weight's order."""

    lora: LoraFactors
    magnitude: Any

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> DoraLeaf:
        axes = axes_of(self.lora.layout, "so")
        leaf = self.lora.attach(w, path, dropout, key)
        return DoraLeaf(leaf, {"magnitude": self.magnitude}, (("magnitude", axes),), path)

    def describe(self) -> str:
        return f"DoRA, {self.lora.describe()}"


def with_magnitude(frozen: Any, lora: Any) -> tuple[Any, Any]:
    """The two trees of `lorafy`, each weight's present column norms trained as well."""

    def at(entry: Any, w: Any) -> Any:
        if not isinstance(entry, LoraFactors):
            return entry
        magnitude = norm(entry.attach(w, ""), axes_of(entry.layout, "so"))
        return DoraFactors(entry, magnitude.astype(entry.lora_a.dtype))

    return frozen, jax.tree.map(at, lora, frozen, is_leaf=lambda x: x is None or is_adapter(x))


def make(params: Any, rank: int | None = None, **options: Any) -> tuple[Any, Any]:
    """(frozen, trained), options as for `jlora.lorafy`."""
    return with_magnitude(*lorafy(params, rank, **options))
