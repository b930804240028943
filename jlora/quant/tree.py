"""Trees with quantised weights: made, undone, merged."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.leaves import is_implicit
from jlora.lora import axes_of
from jlora.merging import combine
from jlora.quant.leaf import QuantisedLeaf
from jlora.quant.schemes import scheme_of
from jlora.targets import letters_of, targeted
from jlora.tree import Targets, path_of, paths


def quantise(
    params: Any,
    scheme: Any = "nf4",
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layouts: Mapping[str, Any] | None = None,
) -> Any:
    """`params` with its matrices as `QuantisedLeaf`s; a function on it must be lifted (`jlora.lift`).

    scheme: "nf4", "int8", "int4", or one of `jlora.quant` with its block: NF4(), Int4(group=128, zero_point=True).
    targets, exclude, layouts: as for `lorafy`; embeddings and the head are left as they are unless named.
    Leaves are done one after another, a matrix of a stack at a time; of `ShapeDtypeStruct`s shapes are made. To keep
    the float weights from ever being whole in memory, quantise while reading: `jlora.io.load(..., quantise=)`.

    Leaves that are implicit already stay. Raises ValueError if nothing matches, if the axes of a weight cannot be told,
    or for a weight that is not finite.
    """
    plan = planned(params, targets, exclude, layouts)

    def at(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        return encoded(leaf, plan[path], path, scheme) if path in plan else leaf

    return jax.tree_util.tree_map_with_path(at, params, is_leaf=is_implicit)


def planned(
    params: Any, targets: Targets = "all-linear", exclude: Targets = (), layouts: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """{path: layout} of the weights that `quantise` would quantise."""
    leaves = paths(params, is_implicit)
    chosen = targeted(LoraConfig(target_modules=targets, exclude_modules=exclude), leaves, layouts)
    return {path: letters_of(path, leaves[path], layouts) for path in chosen if not is_implicit(leaves[path])}


def encoded(w: Any, layout: str, path: str, scheme: Any) -> QuantisedLeaf:
    """One weight. Raises ValueError if it is not finite."""
    make = functools.partial(encode, layout=layout, scheme=scheme_of(scheme))
    leaf = jax.eval_shape(make, w) if isinstance(w, jax.ShapeDtypeStruct) else make(w)
    leaf = dataclasses.replace(leaf, path=path)
    if isinstance(w, jax.ShapeDtypeStruct):
        return leaf
    scales = [x for x in leaf.parts.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    if not any(isinstance(x, jax.core.Tracer) for x in scales) and not all(bool(jnp.isfinite(x).all()) for x in scales):
        raise ValueError(f"{path} {list(w.shape)} holds infinities or NaN: it cannot be quantised")
    return leaf


@functools.partial(jax.jit, static_argnames=("layout", "scheme"))
def encode(w: Any, layout: str, scheme: Any) -> QuantisedLeaf:
    """The leaf of `w`, its matrices in turn."""
    matrices, rows, order, sizes = canonical(w, layout)
    one: Callable[[Any], Any] = lambda m: scheme.encode(m.astype(jnp.float32))
    for _ in range(matrices.ndim - 2):
        one = functools.partial(jax.lax.map, one)
    leaf = QuantisedLeaf(one(matrices), scheme, rows, jnp.dtype(w.dtype), matrices.ndim - 2, layout=layout)
    return placed(leaf, order, sizes)


def canonical(w: Any, layout: str) -> tuple[jax.Array, int, tuple[int, ...], tuple[int, ...]]:
    """(w as matrices [*stack, i, o], i, and what `placed` takes: w's axes in that order, the sizes of all but s)."""
    s_axes, i_axes, o_axes = (axes_of(layout, letter) for letter in "sio")
    order, sizes = (*s_axes, *i_axes, *o_axes), tuple(w.shape[ax] for ax in (*i_axes, *o_axes))
    rows = math.prod(w.shape[ax] for ax in i_axes)
    return jnp.transpose(w, order).reshape(*(w.shape[ax] for ax in s_axes), rows, -1), rows, order, sizes


def placed(leaf: QuantisedLeaf, order: tuple[int, ...], sizes: tuple[int, ...]) -> QuantisedLeaf:
    """The leaf with its weight's axes, of which `order` are the stack, the inputs (of `sizes`) and the outputs."""
    n = leaf.stack
    if len(sizes) > 2:
        leaf = leaf.then(("reshape", sizes))
    back = tuple(order.index(ax) for ax in range(len(order)))
    if back[:n] != tuple(range(n)):
        return dataclasses.replace(leaf, order=back)
    inner = tuple(ax - n for ax in back[n:])
    return leaf if inner == tuple(range(len(inner))) else leaf.then(("transpose", inner))


def from_layers(layers: Iterable[Any], layout: str, path: str, scheme: Any) -> QuantisedLeaf:
    """The leaf of a weight whose layers come one by one (all there is, if `layout` does not begin with s), its arrays
    on the host: no more than one layer is there as floats."""
    made = [jax.device_get(encoded(w, layout.removeprefix("s"), path, scheme)) for w in layers]
    if not layout.startswith("s"):
        return made[0]
    parts = jax.tree.map(lambda *x: np.stack(x), *[leaf.parts for leaf in made])
    return dataclasses.replace(made[0], parts=parts, stack=made[0].stack + 1, layout=layout)


def is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, QuantisedLeaf)


def dequantise(params: Any) -> Any:
    """`params` with its quantised weights written out, each in its dtype."""
    return jax.tree.map(lambda leaf: leaf.materialise() if is_quantised(leaf) else leaf, params, is_leaf=is_implicit)


def merge_quantised(frozen: Any, trained: Any) -> tuple[Any, dict[str, tuple[float, float]]]:
    """(the merged tree, quantised again by each weight's own scheme, what that lost) for the trees of a method.

    What was lost, by path: |error| / |W'| of the merged weight W', and |error| / |W' - W| of its change. A change that
    is small beside the steps of 4 bits is lost almost whole (the second near 1 or above): merge to floats then
    (`jlora.merge`), or serve base and adapter.
    """
    lost: dict[str, tuple[float, float]] = {}

    bases = paths(frozen, is_implicit)

    def at(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        base: Any = bases.get(path)
        if not is_implicit(leaf) or is_quantised(leaf):
            return leaf
        w = leaf.materialise()
        if not is_quantised(base):
            return w
        again = encoded(w, base.layout, path, base.scheme)
        f32 = lambda x: x.astype(jnp.float32)
        error, change = f32(again.materialise()) - f32(w), f32(w) - f32(base.materialise())
        size = lambda x: float(jnp.linalg.norm(x.ravel()))
        lost[path] = (size(error) / max(size(f32(w)), 1e-30), size(error) / max(size(change), 1e-30))
        return again

    return jax.tree_util.tree_map_with_path(at, combine(frozen, trained), is_leaf=is_implicit), lost
