"""IA3: keys, values and the MLP's hidden activations are multiplied by trained vectors (Liu et al. 2022, 2205.05638).

y = (x·W + b) * l for keys and values, y = (x * l)·W + b for the MLP's last weight; l starts at one.
No departure; merged it is W * l (and b * l).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.lora import Adapter, axes_of
from jlora.methods.plant import held, leaves_of, plant, replaced, within
from jlora.methods.points import bias_of, find, layout_of
from jlora.methods.scaled import ScaledLeaf
from jlora.tree import Targets, module_of, names_in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ia3(Adapter):
    """The vector of one weight: `scale`, the stack's axes and the inputs' (or outputs') in the weight's order.

    It stands at the weight's path, or at its module's where a bias is scaled with it: `names` are then (weight, bias).
    """

    scale: Any
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    names: tuple[str, str] | None = dataclasses.field(default=None, metadata={"static": True})

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> Any:
        if self.names is None:
            return ScaledLeaf(w, {"scale": self.scale}, (("scale", self.axes),), path)
        (kernel, bias), leaves = self.names, leaves_of(w)
        first, second = (held(leaves, name, path) for name in (kernel, bias))
        leaf = ScaledLeaf(first, {"scale": self.scale}, (("scale", self.axes),), within(path, kernel))
        return replaced(w, {kernel: leaf, bias: (second * self.scale).astype(second.dtype)})

    def describe(self) -> str:
        return f"scaled by {list(self.scale.shape)}"


def make(
    params: Any,
    *,
    targets: Targets = ("key", "value"),
    feedforward: Targets = ("mlp out",),
    layouts: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    key: Any = None,
) -> tuple[Any, Any]:
    """(frozen, trained): `targets` are weights whose outputs are scaled, `feedforward` those whose inputs are.

    Both: keys of `points.POINTS`, groups ("attention"), names, regexes, or a predicate of (path, leaf). Raises
    ValueError if one matches nothing.
    """
    leaves = leaves_of(params)
    inputs = find(feedforward, leaves, layouts, "feedforward") if callable(feedforward) or feedforward else []
    outputs = find(targets, leaves, layouts, "targets") if callable(targets) or targets else []
    made: dict[str, tuple[Any, Any]] = {}
    for path in dict.fromkeys((*inputs, *outputs)):
        w, bias = leaves[path], None if path in inputs else bias_of(path, leaves)
        axes = axes_of(layout_of(path, w, layouts), "si" if path in inputs else "so")
        ones = jnp.ones(tuple(w.shape[ax] for ax in axes), dtype)
        if bias is None:
            made[path] = (w, Ia3(ones, axes))
        else:
            names = (names_in(path)[-1], names_in(bias)[-1])
            made[module_of(path)] = (None, Ia3(ones, axes, names))
    return plant(params, made)
