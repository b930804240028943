"""The two trees of a method, from what it makes of each leaf it touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.leaves import is_implicit
from jlora.lora import is_adapter, only_plain
from jlora.tree import path_of, paths


def leaves_of(params: Any) -> dict[str, Any]:
    """The leaves of a tree of weights by path, an implicit leaf being one."""
    return paths(params, is_implicit)


def floats_of(params: Any) -> dict[str, Any]:
    """Those of `leaves_of` that can train: no integers, nor what is no array, as a module's activation function."""
    return {path: x for path, x in leaves_of(params).items() if jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating)}


def plant(params: Any, made: Mapping[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    """(frozen, trained): `made` gives (the frozen leaf or None, the trained entry) by path; the rest stays frozen.

    An entry may stand at a module's path, in place of all its leaves, which then stay in `frozen` as they are.
    Raises ValueError for a path at which the tree has nothing.
    """
    leaves, found = leaves_of(params), set[str]()
    modules = made.keys() - leaves.keys()

    def is_module(keys: Any, node: Any) -> bool:
        return is_implicit(node) or path_of(keys) in modules

    def kept(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        return made[path][0] if path in made else leaf

    def entry(keys: Any, _: Any) -> Any:
        path = path_of(keys)
        found.add(path)
        return made[path][1] if path in made else None

    walk = jax.tree_util.tree_map_with_path
    trained = walk(entry, params, is_leaf=is_module, is_leaf_takes_path=True)
    for path in made:
        if path not in found:
            raise ValueError(
                f"{path}: one entry for several weights stands at their module's node, and the tree has none there "
                "(names are flat): nest it by module"
            )
    return walk(kept, params, is_leaf=is_implicit), trained


def within(module: str, name: str) -> str:
    """The path of what is at `name` in a module, which may be the whole tree ("")."""
    return f"{module}/{name}" if module else name


def held(leaves: Mapping[str, Any], name: str, module: str) -> Any:
    """The leaf `name` among a module's. Raises ValueError where it is not, as a method made later trains it whole."""
    if name not in leaves:
        raise ValueError(
            f"{within(module, name)} trains as well: make the method that trains it first, the others after"
        )
    return leaves[name]


def replaced(node: Any, new: Mapping[str, Any]) -> Any:
    """`node`, of any kind of tree, with the leaves that `new` gives by their path in it."""
    return jax.tree_util.tree_map_with_path(lambda keys, x: new.get(path_of(keys), x), node, is_leaf=is_implicit)


def whole(params: Any, chosen: list[str]) -> tuple[Any, Any]:
    """(frozen, trained) with the leaves of these paths trained themselves; they are None in `frozen`.

    Raises ValueError for a leaf that is quantised.
    """
    leaves = leaves_of(params)
    only_plain(leaves, chosen)
    return plant(params, {path: (None, leaves[path]) for path in chosen})


def entries_of(trained: Any) -> dict[str, Any]:
    """The entries of a trained tree by path: adapters, and arrays trained whole."""
    return paths(trained, is_adapter)
