"""Parameter trees by path: names, targets, counts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp

Targets: TypeAlias = str | Iterable[str] | Callable[[str, Any], bool]
"""Which leaves: a name, a regex, a list of them, or a predicate of (path, leaf)."""

REGEX = re.compile(r"[\\^$*+?\[\](){}|]")

LAYER = re.compile(r"(?:^|/)(?:layers?|blocks?|h)[_/](\d+)(?=/|$)")
"""The number of a layer that is called one: layers_3/..., h/3/...; as the next two, searched in `slashed` paths."""
STACK = re.compile(r"(?:^|/)(?:layers?|blocks?|h)/(?!\d+(?:/|$))")
"""A weight whose rows are layers: layers/..., without a number."""
NUMBER = re.compile(r"(?:^|[/_])(\d+)(?=/|$)")


def slashed(path: str) -> str:
    """A path with slashes alone between its names, which torch's flat names ("layers.0.q_proj.weight") part by dots."""
    return path.replace(".", "/")


def names_in(path: str) -> list[str]:
    return slashed(path).split("/")


def module_of(path: str) -> str:
    """The path without its last name, "" for a leaf of the root."""
    return path.removesuffix(names_in(path)[-1])[:-1]


FLAX = {"kernel", "bias", "scale", "embedding", "mean", "var"}


def path_of(keys: tuple[Any, ...]) -> str:
    """A leaf's key path joined by slashes: "layers/self_attn/q_proj/kernel".

    Flax's boxes of arrays (nnx.Param, nn.Partitioned) add no name: a boxed tree has the plain one's paths.
    """
    return jax.tree_util.keystr(keys[:-1] if boxed(keys) else keys, simple=True, separator="/")


def boxed(keys: tuple[Any, ...]) -> bool:
    """Whether the last key is a box's `.value`; an attribute of that name in a module of Equinox is a weight's own."""
    if len(keys) < 2 or keys[-1] != jax.tree_util.GetAttrKey("value"):
        return False
    return isinstance(keys[-2], jax.tree_util.DictKey) or getattr(keys[-2], "name", None) in FLAX


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """([(key path, leaf)], the tree's structure)."""
    return cast(Any, jax.tree_util.tree_flatten_with_path(tree, is_leaf))


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of `tree` by path, in tree order."""
    return {path_of(keys): leaf for keys, leaf in flatten(tree, is_leaf)[0]}


def matches(pattern: str, path: str) -> bool:
    """Whether `path` is meant by `pattern`: a regex found in it, or a name equal to a run of its components.

    "q_proj", "self_attn/q_proj" and "self_attn.q_proj" name layers/self_attn/q_proj/kernel; "proj" does not.
    A pattern with any of the characters \\^$*+?[](){}| is a regex.
    """
    if REGEX.search(pattern):
        try:
            return re.search(pattern, path) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regex: {error}") from None
    return f"/{slashed(pattern.strip('/'))}/" in f"/{slashed(path)}/"


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that means `path`; patterns are tried in order."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def layer_of(path: str) -> int | None:
    """The number of the layer that a weight is in: what `LAYER` finds, else the first one (Block_3/Dense_0/kernel: 3).

    None where there is none, or where the layers are rows of the weight (layers/Dense_0/kernel).
    """
    path = slashed(path)
    found = LAYER.search(path) or (None if STACK.search(path) else NUMBER.search(path))
    return int(found[1]) if found else None


def select(targets: Targets, leaves: Mapping[str, Any], what: str = "targets") -> list[str]:
    """The paths that `targets` means, in tree order. `what`: the argument's name, for the error.

    Raises ValueError for a name or regex that matches nothing, with the nearest names there are.
    """
    if callable(targets):
        found = [path for path, leaf in leaves.items() if targets(path, leaf)]
        if not found:
            raise ValueError(f"{what}: the predicate is true for none of the {len(leaves)} leaves")
        return found
    chosen: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = [path for path in leaves if matches(pattern, path)]
        if not hits:
            raise ValueError(f"{what}: {pattern!r} matches no leaf{near(pattern, leaves)}")
        chosen.update(hits)
    return [path for path in leaves if path in chosen]


def near(pattern: str, leaves: Iterable[str]) -> str:
    """A sentence's end that lists the names closest to `pattern` among path components and whole paths."""
    words = {part: None for path in leaves for part in (path, *names_in(path))}
    close = difflib.get_close_matches(pattern, list(words), n=4, cutoff=0.5)
    some = close or [word for word in words if "/" in word][:4] or list(words)[:4]
    return f"; {'near' if close else 'there are'}: {', '.join(some)}" if some else "; the tree has no leaves"


def size(tree: Any) -> int:
    """Number of elements in all arrays of `tree`."""
    return sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or ShapeDtypeStructs) of `tree`."""
    return sum(
        leaf.size * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    )
