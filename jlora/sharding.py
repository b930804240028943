"""Weights, factors and optimiser state over a mesh of devices; a batch is `jlora.batch_parts`.

`jax.jit` compiles one program for all devices from where its arguments lie; this file says where. Weights are split
by FSDP (Rajbhandari et al., arXiv 1910.02054, stage 3) and by tensors (Shoeybi et al., arXiv 1909.08053), read off
their `layouts` letters, so the rules hold for any model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.leaves import is_implicit
from jlora.lora import LoraFactors, is_adapter
from jlora.placing import specs_on
from jlora.targets import EMBEDDING, is_matrix, letters
from jlora.tree import path_of, paths, slashed

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
BATCH = ("data", "fsdp")
"""The mesh axes that split a batch's rows."""
ROWS = re.compile(r"o_proj|down_proj|c_proj|out_proj|fc2|(^|/)(wo|w2)(/|$)|output/dense|intermediate_output")
"""Weights whose input is what another split weight put out: their input axis goes over `tensor`, so that a block
needs one all-reduce. Any choice gives the same result; this one moves less."""


def make_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `AXES` from one line, as `mesh_sizes` reads it.

    devices: all of `jax.devices()` if not given. Raises ValueError for an unknown axis or sizes that do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(text, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(text: str, count: int) -> dict[str, int]:
    """The size of each of `AXES` over `count` devices from one line: "fsdp=4,tensor=2". Axes not named have size 1; a
    size of -1 takes the devices that are left; nothing named at all is "data=-1".

    Raises ValueError for an unknown axis or sizes that do not fit.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, (text or "data=-1").replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ValueError(f"mesh {text!r}: {part!r} is not AXIS=SIZE with an axis of {', '.join(AXES)}")
        sizes[name] = int(size)
    open_axes = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size > 0)
    if len(open_axes) == 1 and count % given == 0:
        sizes[open_axes[0]] = count // given
    if math.prod(sizes.values()) != count:
        raise ValueError(f"mesh {text!r} makes {given} devices, and there are {count}: the product must be that")
    return sizes


def check_axes(mesh: Mesh) -> None:
    """Raises ValueError for a mesh without one of `AXES`."""
    lacking = [name for name in AXES if name not in mesh.shape]
    if lacking:
        raise ValueError(
            f"the mesh has the axes {', '.join(mesh.shape)} and lacks {', '.join(lacking)}: make it by "
            "jlora.sharding.make_mesh, in which an axis that is not named has size 1"
        )


def specs(tree: Any, layouts: Mapping[str, Any] | None, mesh: Mesh, *, min_size: int = 2**20) -> Any:
    """A tree of `PartitionSpec`s for weights or for a trained tree (adapters follow their weight).

    layouts: as `lorafy` takes them; a quantised leaf knows its own. A matrix's input and output axes are split over
    `fsdp` and `tensor`, an expert axis (the last of several s, or the s of a path with "expert") over `expert`; a stack
    of layers is never split, nor is an axis whose size the mesh does not divide. What is no array (an activation
    function among a module's leaves) has an empty spec, and `place` leaves it as it is.
    min_size: leaves with fewer elements are replicated: gathering them would cost more than keeping them.
    Raises ValueError for a mesh without one of `AXES`.
    """
    check_axes(mesh)

    def at(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        if is_adapter(leaf):
            return adapter_specs(leaf, path, layouts, mesh, min_size)
        if not hasattr(leaf, "shape"):
            return PartitionSpec()
        small = math.prod(leaf.shape) < min_size
        spec = PartitionSpec() if small else weight_spec(path, leaf, layouts, mesh)
        if not is_implicit(leaf):
            return spec
        found = specs_on(mesh, leaf, spec)
        return jax.tree.map(lambda _: PartitionSpec(), leaf) if found is None else found

    return jax.tree_util.tree_map_with_path(at, tree, is_leaf=lambda x: is_adapter(x) or is_implicit(x))


def weight_spec(path: str, leaf: Any, layouts: Mapping[str, Any] | None, mesh: Mesh) -> PartitionSpec:
    """The spec of one weight; axes that cannot be split evenly are left whole."""
    shape = tuple(leaf.shape)
    layout = letters(path, leaf, layouts) if is_matrix(path, leaf, layouts) else ""
    if len(layout) != len(shape) or not {"i", "o"} <= set(layout):
        return PartitionSpec()
    spec: list[str | None] = [None] * len(shape)

    def split(name: str, candidates: Sequence[int]) -> None:
        for ax in sorted(candidates, key=lambda ax: -shape[ax]):
            if mesh.shape[name] > 1 and spec[ax] is None and shape[ax] % mesh.shape[name] == 0:
                spec[ax] = name
                return

    stack, i_axes, o_axes = ([ax for ax, x in enumerate(layout) if x == letter] for letter in "sio")
    if len(stack) > 1 or (stack and "expert" in path):
        split("expert", stack[-1:])
    # an embedding is split along its vocabulary, as the head is
    inputs_first = any(one.search(slashed(path)) for one in (ROWS, EMBEDDING))
    first, second = (i_axes, o_axes) if inputs_first else (o_axes, i_axes)
    split("tensor", first)
    split("fsdp", second if any(spec[ax] is None for ax in second) else first)
    return PartitionSpec(*spec)


def adapter_specs(entry: Any, path: str, layouts: Mapping[str, Any] | None, mesh: Mesh, min_size: int) -> Any:
    """The adapter with a spec for each of its arrays: LoRA's factors follow their weight, the rest is replicated."""

    def of(node: Any) -> Any:
        if not isinstance(node, LoraFactors):
            return PartitionSpec()
        leaf = node.attach(jax.ShapeDtypeStruct(weight_shape(node), jnp.float32), path)
        followed = leaf.shard_specs(weight_spec(path, leaf, {path: node.layout}, mesh))
        pair = {"lora_a": followed.lora_a, "lora_b": followed.lora_b}
        kept = {n: s if math.prod(getattr(node, n).shape) >= min_size else PartitionSpec() for n, s in pair.items()}
        return dataclasses.replace(node, **kept)

    return jax.tree.map(of, entry, is_leaf=lambda x: isinstance(x, LoraFactors))


def weight_shape(factors: LoraFactors) -> tuple[int, ...]:
    """The shape of the weight that the factors are for."""
    stacked = factors.layout.count("s")
    sizes = {
        "s": iter(factors.lora_a.shape[:stacked]),
        "i": iter(factors.lora_a.shape[stacked:-1]),
        "o": iter(factors.lora_b.shape[stacked + 1 :]),
    }
    return tuple(next(sizes[letter]) for letter in factors.layout)


def like(state: Any, trained: Any, trained_specs: Any) -> Any:
    """Specs of an optimiser's state: arrays that mirror a trained leaf (same path and shape) follow it."""
    shapes = {path: tuple(leaf.shape) for path, leaf in paths(trained).items() if hasattr(leaf, "shape")}
    wanted = paths(trained_specs)

    def at(keys: Any, leaf: Any) -> PartitionSpec:
        path = path_of(keys)
        ends = [own for own, shape in shapes.items() if getattr(leaf, "shape", None) == shape and under(path, own)]
        return wanted[max(ends, key=len)] if ends else PartitionSpec()

    def under(path: str, own: str) -> bool:
        return f"/{path}".endswith(f"/{own}")

    return jax.tree_util.tree_map_with_path(at, state)


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """`tree` with each array laid out as its spec says; `ShapeDtypeStruct`s get the sharding. With several processes
    every one gives the whole value and keeps its own part."""

    def at(leaf: Any, spec: PartitionSpec) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(at, tree, specs)
