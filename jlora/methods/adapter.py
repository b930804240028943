"""Adapter layers: small trained networks after (or beside) products with frozen weights of an unmodified model.

Serial: h = y + up(act(down(y))) with y = x·W + b. Houlsby et al. 2019 (1902.00751): after the attention and after the
MLP; Pfeiffer et al. 2021 (2005.00247): after the MLP; Lin et al. 2020 (2004.03829): after the MLP, with a LayerNorm
before `down`. Parallel (He et al. 2022, 2110.04366): h = y + scaling * up(act(down(x))), x being what W multiplies.
AdapterDrop (Rücklé et al. 2021, 2010.11918): no adapters in the first layers.
Departures: `up` starts at zero, so that training starts from the model itself; Pfeiffer's stands before the residual
sum; the parallel one spans the product with one weight, not a whole sub-layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.following import FollowingLeaf, Product, spread
from jlora.leaves import RANK, Labels, contract
from jlora.lora import Adapter, axes_of, leaf_key
from jlora.methods.plant import held, leaves_of, plant, replaced, within
from jlora.methods.points import bias_of, find, layout_of
from jlora.tree import LAYER, Targets, layer_of, module_of, names_in, slashed

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}
KINDS: dict[str, dict[str, Any]] = {
    "houlsby": {"points": ("attention out", "mlp out"), "activation": "gelu"},
    "pfeiffer": {"points": ("mlp out",), "activation": "relu"},
    "lin": {"points": ("mlp out",), "activation": "relu", "norm": True},
    "parallel": {"points": ("mlp in",), "activation": "relu", "parallel": True},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterLeaf(FollowingLeaf):
    """A weight whose products get an adapter. `beside`: down, down_bias, up, up_bias; norm_scale, norm_bias; bias.

    `bias` is the frozen one that the model adds later: a serial adapter reads y with it.
    """

    activation: str = dataclasses.field(default="gelu", metadata={"static": True})
    parallel: bool = dataclasses.field(default=False, metadata={"static": True})
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})

    # broadcast, the adapter would count several times
    rules: ClassVar[dict[str, Any]] = {k: v for k, v in FollowingLeaf.rules.items() if k != "broadcast_in_dim"}
    fixed: ClassVar[tuple[str, ...]] = ("bias",)

    def allows_cut(self, axis: int) -> bool:
        return axis in self.labels("down_bias")

    def after(self, y: Any, x: Any, product: Product) -> Any:
        down, up = self.labels("down"), self.labels("up_bias")
        inner = product.x if self.parallel else product.out
        if not set(down) - {RANK} <= set(inner) or not set(up) <= set(product.out):
            return NotImplemented
        part = {name: array.astype(y.dtype) for name, array in self.beside.items()}
        h = x if self.parallel else y
        at = lambda name, labels: spread(part[name], self.labels(name), labels)
        if "bias" in part and not self.parallel:
            h = h + at("bias", inner)
        if "norm_scale" in part:
            axes = tuple(inner.index(ax) for ax in down if ax not in self.labels("down_bias"))
            wide = h.astype(jnp.float32)
            wide = wide - wide.mean(axes, keepdims=True)
            wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + 1e-6)
            h = wide.astype(y.dtype) * at("norm_scale", inner) + at("norm_bias", inner)
        outer = tuple(ax for ax in inner if ax not in down or ax in self.labels("down_bias"))
        middle = (*outer, RANK)
        h = contract(h, inner, part["down"], down, middle) + at("down_bias", middle)
        h = ACTIVATIONS[self.activation](h)
        h = contract(h, middle, part["up"], self.labels("up"), product.out) + at("up_bias", product.out)
        return y + self.scaling * h

    def materialise(self) -> jax.Array:
        raise ValueError(
            f"{self.path} {list(self.shape)} has an adapter layer, which is no weight: it cannot be merged, "
            "nor used but in a product over the axes it was made for"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterLayer(Adapter):
    """The arrays of one weight's adapter, s the stack's axes, o the outputs' (or inputs', if parallel), r the width.

    down [s, o, r], down_bias [s, r], up [s, r, o], up_bias [s, o]; with a LayerNorm norm_scale and norm_bias [s, o].
    Where the model adds a bias the entry stands at the module's path and `names` are (weight, bias). Of a stack only
    the last layers may have one (`skipped` have none).
    """

    arrays: dict[str, Any]
    axes: tuple[tuple[str, Labels], ...] = dataclasses.field(metadata={"static": True})
    activation: str = dataclasses.field(metadata={"static": True})
    parallel: bool = dataclasses.field(default=False, metadata={"static": True})
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})
    skipped: int = dataclasses.field(default=0, metadata={"static": True})
    names: tuple[str, str] | None = dataclasses.field(default=None, metadata={"static": True})

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> Any:
        """Dropout does not apply: it is that of LoRA's input."""
        if self.names is None:
            return self.leaf(w, path, {})
        (kernel, bias), leaves = self.names, leaves_of(w)
        both = {name: held(leaves, name, path) for name in (kernel, bias)}
        return replaced(w, {kernel: self.leaf(both[kernel], within(path, kernel), {"bias": both[bias]})})

    def leaf(self, w: Any, path: str, extra: dict[str, Any]) -> AdapterLeaf:
        # all of a skipped layer's are zero, so that it adds zero
        widen = lambda x: jnp.pad(x, ((self.skipped, 0), *((0, 0),) * (x.ndim - 1)))
        beside = {name: widen(x) if self.skipped else x for name, x in self.arrays.items()} | extra
        axes = (*self.axes, *((name, dict(self.axes)["up_bias"]) for name in extra))
        return AdapterLeaf(w, beside, axes, path, self.activation, self.parallel, self.scaling)

    def describe(self) -> str:
        return f"{'parallel ' if self.parallel else ''}adapter, width {self.arrays['down'].shape[-1]}"


def make(
    params: Any,
    width: int,
    *,
    kind: str = "houlsby",
    points: Targets | None = None,
    activation: str | None = None,
    norm: bool | None = None,
    scaling: float = 1.0,
    drop: int = 0,
    layouts: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    key: Any = None,
) -> tuple[Any, Any]:
    """(frozen, trained): an adapter of `width` at each product with a weight that `points` means.

    kind: "houlsby", "pfeiffer", "lin" or "parallel": where they stand and what they are (`KINDS`), each part of which
        may be given: points (as `points.find` takes them, or a predicate of (path, leaf)), activation
        ("relu", "gelu", "silu", "tanh"), norm. scaling: what the adapter's result is multiplied by.
    drop: the first layers that get none. key: the PRNG key of `down`, drawn as N(0, 1/inputs); `up` starts at zero.
    Raises ValueError for a kind or activation that is not known, points that match nothing, or a `drop` of layers that
    cannot be told.
    """
    if kind not in KINDS:
        raise ValueError(f"adapter kind {kind!r} is not known: {', '.join(KINDS)} are")
    given = KINDS[kind]
    activation = activation or given["activation"]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not known: {', '.join(ACTIVATIONS)} are")
    if width < 1:
        raise ValueError(f"adapter width {width}: it must be 1 or more")
    parallel, norm = bool(given.get("parallel")), bool(given.get("norm")) if norm is None else norm
    key = jax.random.key(0) if key is None else key
    leaves = leaves_of(params)
    made: dict[str, tuple[Any, Any]] = {}
    chosen, told = find(points or given["points"], leaves, layouts, "points"), False
    for path in chosen:
        w = leaves[path]
        layout = layout_of(path, w, layouts)
        stack, inner, outer = (axes_of(layout, letters) for letters in ("s", "i" if parallel else "o", "o"))
        rows = bool(stack) and not LAYER.search(slashed(path))  # a numbered layer's stack is of experts
        number, skipped = (None, drop) if rows else (layer_of(path), 0)
        told |= rows or number is not None
        if (number is not None and number < drop) or (rows and skipped >= w.shape[stack[0]]):
            continue
        of = lambda axes, w=w: tuple(w.shape[ax] for ax in axes)
        stacked, ins, outs = of(stack), of(inner), of(outer)
        if skipped:
            stacked = (stacked[0] - skipped, *stacked[1:])
        down = jax.random.normal(leaf_key(key, path), (*stacked, *ins, width)) / jnp.prod(jnp.asarray(ins)) ** 0.5
        arrays = {
            "down": down.astype(dtype),
            "down_bias": jnp.zeros((*stacked, width), dtype),
            "up": jnp.zeros((*stacked, width, *outs), dtype),
            "up_bias": jnp.zeros((*stacked, *outs), dtype),
        }
        axes = {
            "down": (*stack, *inner, RANK),
            "down_bias": (*stack, RANK),
            "up": (*stack, RANK, *outer),
            "up_bias": (*stack, *outer),
        }
        if norm:
            arrays |= {"norm_scale": jnp.ones((*stacked, *ins), dtype), "norm_bias": jnp.zeros((*stacked, *ins), dtype)}
            axes |= dict.fromkeys(("norm_scale", "norm_bias"), (*stack, *inner))
        bias = None if parallel else bias_of(path, leaves)
        entry = AdapterLayer(arrays, tuple(axes.items()), activation, parallel, scaling, skipped)
        if bias is None:
            made[path] = (w, entry)
        else:
            names = (names_in(path)[-1], names_in(bias)[-1])
            made[module_of(path)] = (None, dataclasses.replace(entry, names=names))
    if drop and not told:
        raise ValueError(f"drop={drop}: no layer number in {chosen[0]}")
    if not made:
        raise ValueError(f"drop={drop} leaves no layer with an adapter")
    return plant(params, made)
