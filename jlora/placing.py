"""Where arrays lie on a mesh, as far as products and leaves must know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_explicit_mesh(*arrays: Any) -> bool:
    """Whether one lies on a mesh whose axes are part of types (`AxisType.Explicit`, what `jax.make_mesh` makes)."""
    return any(AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types for x in arrays)


def lying(x: tuple[Any, Any], y: tuple[Any, Any], out_axes: Sequence[Any]) -> dict[str, Any]:
    """`out_sharding` of a product on an explicit mesh, where it must be said if what is summed is split: each axis as
    in the operand that has it, a mesh axis once. Operands are (array, its axes). Else nothing."""
    if not on_explicit_mesh(x[0], y[0]):
        return {}
    names: dict[Any, Any] = {}
    for array, axes in (x, y):
        taken = set(jax.tree.leaves(list(names.values())))
        for ax, name in zip(axes, jax.typeof(array).sharding.spec, strict=True):
            if ax in out_axes and names.get(ax) is None and not taken & set(jax.tree.leaves(name)):
                names[ax] = name
    where = next(jax.typeof(v).sharding.mesh for v, _ in (x, y) if on_explicit_mesh(v))
    return {"out_sharding": NamedSharding(where, PartitionSpec(*(names.get(ax) for ax in out_axes)))}


def dividing(shape: tuple[int, ...], names: Any, mesh: Any) -> PartitionSpec:
    """`names` without those whose devices do not divide their axis."""

    def count(entry: Any) -> int:
        return math.prod(mesh.shape[name] for name in ((entry,) if isinstance(entry, str) else entry or ()))

    return PartitionSpec(*(n if size % count(n) == 0 else None for size, n in zip(shape, names, strict=False)))


def specs_on(mesh: Any, leaf: Any, spec: Any) -> Any:
    """The implicit leaf with a spec for each of its arrays, the weight's being `spec`, or None: as `shard_specs` for
    `jit`, an axis that does not divide left whole."""
    found = leaf.shard_specs(spec, exact=False)
    if found is None:
        return None

    def at(array: Any, spec: Any) -> PartitionSpec:
        return dividing(array.shape, spec, mesh)

    return jax.tree.map(at, leaf, found)
