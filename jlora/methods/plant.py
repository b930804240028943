"""The two trees of a method, from what it makes of each leaf it touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jlora.leaves import is_implicit
from jlora.lora import is_adapter, only_plain
from jlora.tree import path_of, paths


def leaves_of(params: Any) -> dict[str, Any]:
    """The leaves of a tree of weights by path, an implicit leaf being one."""
    return paths(params, is_implicit)


def plant(params: Any, made: Mapping[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    """(frozen, trained): `made` gives (the frozen leaf or None, the trained entry) by path; the rest stays frozen.

    An entry may stand at a module's path, in place of all its leaves, which then stay in `frozen` as they are.
    """

    def part(n: int) -> Any:
        def at(keys: Any, leaf: Any) -> Any:
            path = path_of(keys)
            return made[path][n] if path in made else (leaf if n == 0 else None)

        return jax.tree_util.tree_map_with_path(at, params, is_leaf=is_implicit)

    trained, leaves = part(1), leaves_of(params)
    for path, (_, entry) in made.items():
        if path not in leaves:
            trained = put(trained, path.split("/"), entry)
    return part(0), trained


def put(tree: Any, names: list[str], value: Any) -> Any:
    """`tree`, of nested mappings, with `value` at these names. Raises ValueError where it is no mapping."""
    if not names:
        return value
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"an entry for the module {'/'.join(names)} needs a tree of mappings, not {type(tree).__name__}"
        )
    head, *rest = names
    return type(tree)({**tree, head: put(tree[head], rest, value)})  # pyright: ignore[reportCallIssue]


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
