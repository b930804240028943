"""How a `LabelledLeaf` goes through structural primitives (transpose, reshape, slice, ...): w changes as the equation
says, and the arrays beside it follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.leaves import RANK, Labels, LoraLeaf, is_implicit, registering

STRUCTURE: dict[str, Callable[..., Any]] = {}
"""The rules of this file by primitive, for the `rules` of any `LabelledLeaf`."""
rule = registering(STRUCTURE)


@rule("transpose")
def transpose(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return leaf.map_parts(bind(leaf.w), lambda array, _: array, eqn.params["permutation"].index)


@rule("copy", "copy_p", "name", "sharding_constraint", "mesh_cast", "reshard", "reduce_precision", "pvary", "pcast")
def only_w(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    """The weight in another dtype, place or name; the arrays keep their own and follow the operand at the product."""
    return leaf.map_parts(bind(leaf.w), lambda array, _: array, lambda ax: ax)


@rule("convert_element_type")
def convert_element_type(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return NotImplemented
    return only_w(eqn, bind, position, leaf)


@rule("stop_gradient")
def stop_gradient(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return leaf.map_parts(bind(leaf.w), lambda array, _: lax.stop_gradient(array), lambda ax: ax)


@rule("squeeze")
def squeeze(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    gone = tuple(eqn.params["dimensions"])

    def change(array: Any, axes: Labels) -> Any:
        return lax.squeeze(array, tuple(axes.index(ax) for ax in gone if ax in axes))

    kept = [ax for ax in range(leaf.ndim) if ax not in gone]
    return leaf.map_parts(bind(leaf.w), change, lambda ax: kept.index(ax) if ax in kept else None)


def whole_rows(eqn: Any, leaf: Any) -> bool:
    """Whether what the equation cuts off may be cut off."""
    sizes = eqn.outvars[0].aval.shape
    return all(sizes[ax] == leaf.shape[ax] or leaf.allows_cut(ax) for ax in range(leaf.ndim))


@rule("slice")
def slice_(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    if not whole_rows(eqn, leaf):
        return NotImplemented
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * leaf.ndim

    def change(array: Any, axes: Labels) -> Any:
        index = tuple(slice(None) if ax == RANK else slice(start[ax], limit[ax], strides[ax]) for ax in axes)
        cut = [index[n] if size != 1 else slice(None) for n, size in enumerate(array.shape)]
        return array[tuple(cut)]

    return leaf.map_parts(bind(leaf.w), change, lambda ax: ax)


@rule("dynamic_slice")
def dynamic_slice(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, *starts: Any) -> Any:
    if position != 0 or not whole_rows(eqn, leaf):
        return NotImplemented
    sizes = eqn.params["slice_sizes"]

    def change(array: Any, axes: Labels) -> Any:
        if all(ax == RANK or sizes[ax] == leaf.shape[ax] for ax in axes):
            return array
        zero = jnp.zeros((), starts[0].dtype)
        at = [zero if ax == RANK else starts[ax] for ax in axes]
        size = [array.shape[n] if ax == RANK else sizes[ax] for n, ax in enumerate(axes)]
        return lax.dynamic_slice(array, at, size)

    return leaf.map_parts(bind(leaf.w, *starts), change, lambda ax: ax)


@rule("split")
def split(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    if not whole_rows(eqn, leaf):
        return NotImplemented
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    stops = np.cumsum(sizes)
    pieces = []
    for w, size, stop in zip(bind(leaf.w), sizes, stops, strict=True):

        def change(array: Any, axes: Labels, lo: int = int(stop - size), hi: int = int(stop)) -> Any:
            return lax.slice_in_dim(array, lo, hi, axis=axes.index(axis)) if axis in axes else array

        pieces.append(leaf.map_parts(w, change, lambda ax: ax))
    return pieces


@rule("broadcast_in_dim")
def broadcast_in_dim(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, *dynamic: Any) -> Any:
    """New axes are in neither factor: the difference is constant along them."""
    if dynamic:
        return NotImplemented
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    grown = {ax for ax, to in enumerate(where) if leaf.shape[ax] != shape[to]}

    def change(array: Any, axes: Labels) -> Any:
        return lax.squeeze(array, tuple(axes.index(ax) for ax in grown if ax in axes))

    return leaf.map_parts(bind(leaf.w), change, lambda ax: None if ax in grown else where[ax])


@rule("reshape")
def reshape(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, *dynamic: Any) -> Any:
    """Merging and splitting axes that lie in the same arrays; anything else has no arrays of this form."""
    new = tuple(eqn.params["new_sizes"])
    if dynamic or eqn.params["dimensions"] is not None:
        return NotImplemented
    parts = {name: reshape_part(array, labels, leaf.shape, new) for name, (array, labels) in leaf.parts().items()}
    if any(part is None for part in parts.values()):
        return NotImplemented
    w = bind(leaf.w)
    # an adapted weight inside that has no such reshape was written out, and is no part to follow
    return NotImplemented if is_implicit(leaf.w) and not is_implicit(w) else leaf.with_parts(w, parts)


def reshape_part(array: Any, axes: Labels, old_shape: Labels, new_shape: Labels) -> tuple[Any, Labels] | None:
    """An array that runs along `axes` of a weight, and its axes, after the weight's reshape; None where it has none."""
    groups = reshape_groups(old_shape, new_shape)
    if groups is None:
        return None
    for old, new in groups:
        held = [ax for ax in old if ax in axes]
        wide = [ax for ax in old if old_shape[ax] > 1]
        if not held and not wide:
            continue
        if [ax for ax in wide if ax in axes] not in ([], wide):
            return None
        if not [ax for ax in held if old_shape[ax] > 1]:  # only axes of size 1 here: they carry nothing
            array = lax.squeeze(array, tuple(axes.index(ax) for ax in held))
            axes = tuple(ax for ax in axes if ax not in held)
            continue
        at = axes.index(held[0])
        others = [ax for ax in axes if ax not in held]
        at = len([ax for ax in axes[:at] if ax not in held])
        order = others[:at] + held + others[at:]
        array = jnp.transpose(array, [axes.index(ax) for ax in order])
        sizes = [new_shape[n] for n in new]
        middle = array.shape[at : at + len(held)]
        array = array.reshape(*array.shape[:at], *sizes, *array.shape[at + len(middle) :])
        axes = (*others[:at], *(NEW + n for n in new), *others[at:])
    return array, tuple(ax - NEW if ax >= NEW else ax for ax in axes)


NEW = 1 << 16
"""Marks an axis number of the reshaped weight while old and new numbers stand side by side."""


def reshape_groups(old: Labels, new: Labels) -> list[tuple[list[int], list[int]]] | None:
    """The finest pairing of runs of old axes with runs of new axes of equal product; None for empty arrays."""
    if 0 in old or math.prod(old) != math.prod(new):
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        have, want = 1, 1
        if i < len(old):
            left, have, i = [i], old[i], i + 1
        if j < len(new) and not (have == 1 and new[j] != 1):
            right, want, j = [j], new[j], j + 1
        while have != want:
            if have < want:
                left.append(i)
                have, i = have * old[i], i + 1
            else:
                right.append(j)
                want, j = want * new[j], j + 1
        groups.append((left, right))
    return groups


LoraLeaf.rules.update(STRUCTURE)
