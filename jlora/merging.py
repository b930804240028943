"""The two trees as one: `combine` for a lifted function, `merge` for plain weights (section 4.1)."""

from __future__ import annotations

import numbers
import warnings
from typing import Any

import jax

from jlora.leaves import is_implicit
from jlora.lora import Together, is_adapter, leaf_key, typed
from jlora.tree import flatten, path_of, paths


def combine(frozen: Any, lora: Any, *, dropout: float = 0.0, key: Any = None) -> Any:
    """The tree a lifted function takes: adapted weights as `LoraLeaf`s, whole-trained ones from `lora`.

    dropout: probability of dropping an element of the adapter's input, in [0, 1); needs `key`, a fresh one each step.
    Raises ValueError for a dropout out of range or without a key, trees of different structures, shapes that are not of
    one model, or an adapter in the first tree.
    """
    if not isinstance(dropout, numbers.Real) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout!r:.40}: it must be a number of at least 0 and below 1")
    dropout = float(dropout)
    if dropout and key is None:
        raise ValueError("dropout needs key=: a fresh PRNG key each step (leave both out to evaluate)")
    key = None if key is None else typed(key)
    if isinstance(lora, Together):
        for n, tree in enumerate(lora.trees):
            frozen = combine(frozen, tree, dropout=dropout, key=None if key is None else jax.random.fold_in(key, n))
        return frozen

    def at(keys: Any, entry: Any, w: Any) -> Any:
        if entry is None:
            return w
        path = path_of(keys)
        if any(map(is_adapter, jax.tree.leaves(w, is_leaf=is_adapter))):
            raise ValueError(f"{path}: the first tree holds an adapter: it is combine(frozen, lora), in this order")
        if not is_adapter(entry):
            first, second = (getattr(x, "shape", None) for x in (w, entry))
            if first is not None and second is not None and first != second:
                raise ValueError(f"{path}: {list(first)} in the first tree, {list(second)} in the second")
            return entry
        return entry.attach(w, path, dropout, leaf_key(key, path) if dropout else None)

    def is_entry(x: Any) -> bool:
        return x is None or is_adapter(x)

    differ = unlike(frozen, lora, is_entry)
    if differ:
        raise ValueError(f"the trees differ: {differ}; lorafy, load_adapter and tree_map keep both alike")
    return jax.tree_util.tree_map_with_path(at, lora, frozen, is_leaf=is_entry)


def unlike(frozen: Any, lora: Any, is_entry: Any) -> str:
    """In what path the trees are not alike, or "". An entry of `lora` may stand in place of a subtree of `frozen`."""
    entries, treedef = flatten(lora, is_entry)
    try:
        treedef.flatten_up_to(frozen)
        return ""
    except ValueError:
        held = list(paths(frozen, lambda x: x is None or is_implicit(x)))
    mine = [path_of(keys) for keys, _ in entries]
    lost = [path for path in mine if not any(under(name, path) for name in held)]
    more = [name for name in held if not any(under(name, path) for path in mine)]
    where = f"{lost[0]} is in the second only" if lost else f"{more[0]} is in the first only" if more else ""
    return where or f"{type(frozen).__name__} and {type(lora).__name__}"


def under(name: str, path: str) -> bool:
    """Whether the leaf `name` is at `path` or in the subtree there."""
    return path in ("", name) or name.startswith(f"{path}/")


class MergedAsFloats(UserWarning):
    """A merge wrote quantised weights out."""


def merge(frozen: Any, lora: Any) -> Any:
    """A plain tree of weights W + scaling * A·B, each in its weight's dtype, the product taken in full precision.

    Un-merging is keeping `frozen`: it still holds W exactly. Of a quantised W the sum is taken with what its codes
    mean, and the whole result is floats: a warning says so (`jlora.quant.merge_quantised` keeps codes). Raises
    ValueError for what is no weight (an adapter layer, a prefix).
    """
    for path, entry in paths(lora, is_adapter).items():
        if is_adapter(entry) and not entry.mergeable:
            raise ValueError(f"{path or 'the tree'} has {entry.describe()}, which is no weight: it cannot be merged")
    codes = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_implicit) if is_implicit(leaf)]
    if codes:
        kind = type(codes[0]).__name__
        text = f"{len(codes)} weights of the base are {kind}s: merged onto what they stand for, as plain arrays"
        warnings.warn(text, MergedAsFloats, stacklevel=2)

    def at(leaf: Any) -> Any:
        if not is_implicit(leaf):
            return leaf
        space = jax.typeof(jax.tree.leaves(leaf)[0]).memory_space
        if space == jax.memory.Space.Device:
            return leaf.materialise()
        return jax.device_put(jax.device_put(leaf, jax.memory.Space.Device).materialise(), space)

    return jax.tree.map(at, combine(frozen, lora), is_leaf=is_implicit)
