"""Which weights are adapted, and which axes of a weight are input and output, by name or by `jlora.layouts`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from jlora.config import LoraConfig
from jlora.tree import layer_of, matches, names_in, select, slashed

GROUPS = {
    "all-linear": re.compile(""),
    "attention": re.compile(r"att(n|ention)", re.I),
    "mlp": re.compile(r"mlp|ffn|feed_?forward|intermediate|(^|/)fc[12](/|$)|(?<!attention/)\boutput/dense(/|$)", re.I),
}
EMBEDDING = re.compile(r"embed|(^|/)wte|(^|/)wpe|position(?!.?wise)", re.I)
BIAS = {"bias", "b", "beta", "offset"}
VECTOR = BIAS | {"scale", "g", "gamma", "mean", "var"}
HEAD = {"lm_head", "score", "classifier"}


def known(path: str, layouts: Mapping[str, Any] | None) -> Any:
    """What `layouts` says of `path`: its own entry, an entry that ends in it, or the first pattern that means it."""
    if not layouts:
        return None
    if path in layouts:
        return layouts[path]
    meant = next((name for name in layouts if name.endswith(f"/{path}")), None)
    meant = meant or next((name for name in layouts if matches(name, path)), None)
    return None if meant is None else layouts[meant]


def check_layouts(layouts: Mapping[Any, Any] | None) -> None:
    """Raises ValueError for what is no table of letters by path or pattern."""
    if layouts is None:
        return
    if not isinstance(layouts, Mapping):
        raise ValueError(f"layouts is a {type(layouts).__name__}: {{path or pattern: letters}}, or jlora.layouts(...)")
    for name, value in layouts.items():
        if isinstance(value, str) and not set(value) <= set("sio"):
            raise ValueError(f"layouts[{name!r}] = {value!r}: one letter an axis, s, i or o")


def targeted(config: LoraConfig, leaves: Mapping[str, Any], layouts: Mapping[str, Any] | None) -> list[str]:
    """The paths of the weights to adapt, in tree order. Raises ValueError if there is none."""
    wanted: Any = config.target_modules
    matrices = {path: leaf for path, leaf in leaves.items() if is_matrix(path, leaf, layouts)}
    if callable(wanted):
        floats = {p: x for p, x in leaves.items() if jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating)}
        deep = {p: x for p, x in floats.items() if len(x.shape) > 1}
        chosen = select(wanted, deep, "targets")  # pyright: ignore[reportArgumentType]
    else:
        chosen: list[str] = []
        for pattern in [wanted] if isinstance(wanted, str) else list(wanted):
            if pattern in GROUPS:
                found = in_group(pattern, matrices, layouts)
                if not found:
                    raise ValueError(f"targets: {pattern!r} finds no linear weight; name them, or give layouts=")
                chosen += found
            else:
                chosen += named(pattern, matrices, leaves)
    if config.exclude_modules:
        gone = set(select(config.exclude_modules, leaves, "exclude"))
        chosen = [path for path in chosen if path not in gone]
    if config.layers_to_transform is not None:
        chosen = in_layers(chosen, config.layers_to_transform)
    if not chosen:
        raise ValueError("targets: nothing is left to adapt after exclude_modules and layers_to_transform")
    return [path for path in leaves if path in set(chosen)]


def in_group(name: str, matrices: Iterable[str], layouts: Mapping[str, Any] | None) -> list[str]:
    """The linear weights of one of `GROUPS`."""
    return [path for path in matrices if GROUPS[name].search(slashed(path)) and is_linear(path, layouts)]


def named(pattern: str, matrices: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[str]:
    hits = select(pattern, leaves)
    found = [path for path in hits if path in matrices]
    if not found:
        shapes = ", ".join(f"{path} {list(getattr(leaves[path], 'shape', ()))}" for path in hits[:4])
        raise ValueError(f"targets: {pattern!r} matches no matrix, only {shapes}; train those whole with train=")
    return found


def in_layers(chosen: list[str], layers: tuple[int, ...]) -> list[str]:
    if all(layer_of(path) is None for path in chosen):
        raise ValueError(f"layers_to_transform={layers}: no layer number in {chosen[0]}; a scanned stack is one leaf")
    return [path for path in chosen if layer_of(path) in layers]


def is_matrix(path: str, leaf: Any, layouts: Mapping[str, Any] | None) -> bool:
    if len(getattr(leaf, "shape", ())) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    said = known(path, layouts)
    if said is not None:
        letters = str(getattr(said, "letters", said))
        return "i" in letters and "o" in letters
    return names_in(path)[-1] not in VECTOR


def is_linear(path: str, layouts: Mapping[str, Any] | None) -> bool:
    """Whether a matrix belongs to "all-linear": no embedding and no head (as in PEFT)."""
    kind = getattr(known(path, layouts), "kind", None)
    by_name = "embedding" if EMBEDDING.search(slashed(path)) else "linear"
    return (kind or by_name) in ("linear", "conv") and not HEAD & set(names_in(path))


def letters(path: str, leaf: Any, layouts: Mapping[str, Any] | None) -> str:
    """One letter an axis: what `layouts` say, a quantised leaf's own, or what the name says of two axes; else ""."""
    said = known(path, layouts)
    if said is not None:
        return str(getattr(said, "letters", said))
    own = getattr(leaf, "layout", None)  # jax's arrays have another thing of that name
    if isinstance(own, str):
        return own
    # Equinox and torch keep `weight` as (out, in); Flax and Haiku `kernel` and `w` as (in, out)
    out_first = names_in(path)[-1] == "weight" and not EMBEDDING.search(slashed(path))
    return "" if len(leaf.shape) != 2 else "oi" if out_first else "io"


def letters_of(path: str, leaf: Any, layouts: Mapping[str, Any] | None) -> str:
    """The letters of a matrix. Raises ValueError where nothing tells them, or they are not of this shape."""
    found = letters(path, leaf, layouts)
    if not found:
        raise ValueError(
            f"the axes of {path} {list(leaf.shape)} cannot be told from its shape: pass layouts={{{path!r}: "
            f"{'s' * (len(leaf.shape) - 2) + 'io'!r}}} (s stacked or expert, i input, o output) "
            f"or layouts=jlora.layouts(apply, params, *example)"
        )
    if len(found) != len(leaf.shape) or not set(found) <= set("sio") or not set("io") <= set(found):
        raise ValueError(
            f"layout {found!r} for {path} {list(leaf.shape)}: one letter an axis, s, i or o, with an i and an o"
        )
    return found
