"""`layouts(f, params, *example)`: what each weight is, read off the traced function.

The interpreter of `lift` runs the function on shapes alone, with a `Probe` for each weight: it follows the weight's
axes through transposes, reshapes and slices and notes what every primitive does with them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.extend.core
import jax.numpy as jnp

from jlora.leaves import AroundLeaf, MaterialisedWarning, is_implicit, registering
from jlora.lift import is_array, lift
from jlora.rules_structure import reshape_groups
from jlora.tree import flatten, path_of

Axis = tuple[int, ...]
"""The axes of the original weight that an axis of the probe runs along; none for a broadcast one."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a leaf is.

    kind: "linear", "conv", "embedding", "bias", "scale", "other" (used in another way) or "unused".
    letters: one an axis, s(tacked), i(nput) or o(utput); "" if no product with it was seen.
    tied: used both as an embedding and in a product, or in products that contract different axes.
    """

    kind: str
    letters: str = ""
    tied: bool = False


class Notes:
    """What was seen of each path. Compared by identity, so a cached trace of another call is never taken for this."""

    def __init__(self) -> None:
        self.uses: dict[str, list[tuple[str, frozenset[int]]]] = defaultdict(list)
        self.stacked: dict[str, set[int]] = defaultdict(set)

    def use(self, path: str, kind: str, contracted: Any = ()) -> None:
        self.uses[path].append((kind, frozenset(contracted)))

    def layout(self, path: str, shape: tuple[int, ...]) -> Layout:
        uses = self.uses[path]
        products = list(dict.fromkeys(use for use in uses if use[0] in ("linear", "conv", "embedding")))
        if not products:
            kinds = [kind for kind, _ in uses]
            return Layout(next((kind for kind in ("scale", "bias", "other") if kind in kinds), "unused"))
        kind, contracted = next((use for use in products if use[0] == "embedding"), products[0])
        letters = "".join(
            "i" if ax in contracted else "s" if ax in self.stacked[path] else "o" for ax in range(len(shape))
        )
        if not {"i", "o"} <= set(letters):  # an inner product with a vector a layer: a scale of rank one, no matrix
            return Layout("scale" if kind == "linear" else kind)
        return Layout(kind, letters, len({contracted for _, contracted in products}) > 1 or self.twice(products))

    @staticmethod
    def twice(products: list[tuple[str, frozenset[int]]]) -> bool:
        return len({kind for kind, _ in products}) > 1


class Rules(dict[str, Callable[..., Any]]):
    """A probe has something to note at every primitive."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Callable[..., Any]:
        return other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(AroundLeaf):
    """A weight whose uses are noted. `axes`: where each of its axes comes from."""

    w: Any
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    notes: Notes = dataclasses.field(metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = Rules()

    def materialise(self) -> Any:
        return self.w

    def unstack(self) -> tuple[Any, Callable[[Any], Any]]:
        self.notes.stacked[self.path].update(self.axes[0])
        return self.w, lambda row: dataclasses.replace(self, w=row, axes=self.axes[1:])

    def shard_specs(self, spec: Any, exact: bool = True) -> Any:
        return dataclasses.replace(self, w=spec)

    def moved(self, w: Any, axes: Any) -> Probe:
        return dataclasses.replace(self, w=w, axes=tuple(axes))

    def origin(self, axes: Iterable[int]) -> set[int]:
        return {at for ax in axes for at in self.axes[ax]}


def layouts(f: Callable[..., Any], params: Any, *example: Any, **options: Any) -> dict[str, Layout]:
    """{path: Layout} for the leaves of `params`, from the trace of `f(params, *example, **options)` alone.

    params, example: arrays or `jax.ShapeDtypeStruct`s; nothing is computed. `lorafy(..., layouts=)` takes the result.
    """
    notes = Notes()
    params = jax.tree.map(as_shape, params, is_leaf=is_implicit)
    keyed, treedef = flatten(params)
    shaped = [(path_of(keys), leaf) for keys, leaf in keyed if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def probed(arrays: list[Any], *example: Any) -> Any:
        found = dict(zip([path for path, _ in shaped], arrays, strict=True))
        leaves = [probe(path_of(keys), found.get(path_of(keys), leaf), notes) for keys, leaf in keyed]
        return lift(f)(jax.tree.unflatten(treedef, leaves), *example, **options)

    flat, example_def = flatten(example)
    traced = [n for n, (_, x) in enumerate(flat) if is_array(x) or isinstance(x, jax.ShapeDtypeStruct)]

    def on_shapes(arrays: list[Any], inputs: list[Any]) -> Any:
        full = [x for _, x in flat]
        for n, x in zip(traced, inputs, strict=True):
            full[n] = x
        return probed(arrays, *jax.tree.unflatten(example_def, full))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterialisedWarning)
        jax.eval_shape(on_shapes, [leaf for _, leaf in shaped], [flat[n][1] for n in traced])
    return {path: notes.layout(path, tuple(leaf.shape)) for path, leaf in shaped}


def as_shape(leaf: Any) -> Any:
    """What an implicit leaf is to the function: its shape and dtype."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_implicit(leaf) else leaf


def probe(path: str, leaf: Any, notes: Notes) -> Any:
    if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return Probe(leaf, tuple((n,) for n in range(leaf.ndim)), path, notes)


# ------------------------------------------------------- what each primitive tells


rule = registering(Probe.rules)


def other(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    leaf = operands[position]
    leaf.notes.use(leaf.path, "other")
    return bind(*(leaf.w if n == position else x for n, x in enumerate(operands)))


@rule("dot_general")
def dot_general(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    leaf = operands[position]
    summed, batch = (pair[position] for pair in eqn.params["dimension_numbers"])
    leaf.notes.stacked[leaf.path].update(leaf.origin(batch))
    leaf.notes.use(leaf.path, "linear", leaf.origin(summed))
    return bind(*(leaf.w if n == position else x for n, x in enumerate(operands)))


@rule("ragged_dot_general")
def ragged_dot(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    numbers, leaf = eqn.params["ragged_dot_dimension_numbers"], operands[position]
    if position != 1:
        return other(eqn, bind, position, *operands)
    (_, summed), (_, batch) = numbers.dot_dimension_numbers
    leaf.notes.stacked[leaf.path].update(leaf.origin((*batch, *numbers.rhs_group_dimensions)))
    leaf.notes.use(leaf.path, "linear", leaf.origin(summed))
    return bind(*(leaf.w if n == position else x for n, x in enumerate(operands)))


@rule("conv_general_dilated")
def conv(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    leaf = operands[position]
    _, *contracted = eqn.params["dimension_numbers"].rhs_spec
    leaf.notes.use(leaf.path, "conv" if position == 1 else "other", leaf.origin(contracted))
    return bind(*(leaf.w if n == position else x for n, x in enumerate(operands)))


@rule("gather")
def gather(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, indices: Any) -> Any:
    dims = eqn.params["dimension_numbers"]
    out = bind(leaf.w, indices) if position == 0 else None
    if out is None or tuple(dims.collapsed_slice_dims) != tuple(dims.start_index_map):
        return other(eqn, bind, position, leaf, indices)
    picked = leaf.origin(dims.start_index_map)
    batching = dict(zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True))
    rest = [ax for ax in range(leaf.ndim) if ax not in dims.collapsed_slice_dims and ax not in batching]
    leaf.notes.stacked[leaf.path].update(leaf.origin(batching))
    if indices.ndim - len(batching) > 1 and len(rest) == 1:  # rows for tokens, however few
        leaf.notes.use(leaf.path, "embedding", picked)
        return out
    leaf.notes.stacked[leaf.path].update(picked)
    axes: list[Axis] = [()] * out.ndim
    batch_out = [n for n in range(out.ndim) if n not in dims.offset_dims]
    for ax, to in zip(rest, dims.offset_dims, strict=True):
        axes[to] = leaf.axes[ax]
    for ax, n in batching.items():
        axes[batch_out[n]] = leaf.axes[ax]
    return leaf.moved(out, axes)


@rule("add", "sub", "add_any", "mul", "div")
def elementwise(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    """With a number it is the same weight still (Gemma's 1 + scale); with an array it is a bias or a scale."""
    leaf, x = operands[position], operands[1 - position]
    out = bind(*(leaf.w if n == position else y for n, y in enumerate(operands)))
    if x.ndim == 0 or isinstance(eqn.invars[1 - position], jax.extend.core.Literal):
        return leaf.moved(out, leaf.axes)
    leaf.notes.use(leaf.path, "scale" if eqn.primitive.name in ("mul", "div") else "bias")
    return out


@rule(
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "sharding_constraint",
    "reshard",
    "reduce_precision",
    "neg",
    "pvary",
    "pcast",
    "slice",
    "stop_gradient",
)
def same(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    out = bind(leaf.w)
    narrowed = [ax for ax, (old, new) in enumerate(zip(leaf.shape, out.shape, strict=True)) if new == 1 < old]
    leaf.notes.stacked[leaf.path].update(leaf.origin(narrowed))
    return leaf.moved(out, leaf.axes)


@rule("transpose")
def transpose(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return leaf.moved(bind(leaf.w), (leaf.axes[ax] for ax in eqn.params["permutation"]))


@rule("squeeze")
def squeeze(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return leaf.moved(bind(leaf.w), (a for n, a in enumerate(leaf.axes) if n not in eqn.params["dimensions"]))


@rule("dynamic_slice")
def dynamic_slice(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, *starts: Any) -> Any:
    one = [ax for ax, size in enumerate(eqn.params["slice_sizes"]) if size == 1 < leaf.shape[ax]]
    leaf.notes.stacked[leaf.path].update(leaf.origin(one))
    return leaf.moved(bind(leaf.w, *starts), leaf.axes)


@rule("split")
def split(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return [leaf.moved(piece, leaf.axes) for piece in bind(leaf.w)]


@rule("broadcast_in_dim")
def broadcast(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    axes: list[Axis] = [()] * len(eqn.params["shape"])
    for ax, to in enumerate(eqn.params["broadcast_dimensions"]):
        axes[to] = leaf.axes[ax]
    return leaf.moved(bind(leaf.w), axes)


@rule("reshape")
def reshape(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    groups = reshape_groups(leaf.shape, tuple(eqn.params["new_sizes"]))
    if groups is None:
        return other(eqn, bind, position, leaf)
    axes: list[Axis] = [()] * len(eqn.params["new_sizes"])
    for old, new in groups:
        wide = sorted(leaf.origin(ax for ax in old if leaf.shape[ax] > 1))
        for n in new:
            axes[n] = tuple(wide)
    return leaf.moved(bind(leaf.w), axes)
