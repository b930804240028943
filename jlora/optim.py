"""Optimisers for one combined tree: what trains in it, and freezing the rest bit for bit.

With the two trees of `lorafy` none of this is needed: `tx.init(lora)` sees no frozen weight. It is for users of a
`TrainState` that holds one tree, `combine(frozen, lora)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jlora.leaves import is_implicit
from jlora.tree import Targets, path_of, paths, select


def trainable_labels(tree: Any, also: Targets = ()) -> Any:
    """`tree` with a label for each array: "lora_a", "lora_b" (a method's own names likewise) or "frozen".

    also: plain leaves that train whole (names, regexes or a predicate); they are labelled "whole".
    For `optax.partition`, e.g. LoRA+ : {"lora_a": adamw(lr), "lora_b": adamw(16 * lr), "frozen": keep()}.
    Raises ValueError for an `also` that matches no plain leaf.

    Only in two trees train AdaLoRA, parts of a fused weight, IA3 where there is a bias, prefixes of a layer and of keys
    and values, P-tuning's network, the top rows of a stack and intrinsic dimension: one tree holds what they make of
    the weights, not the numbers that it is made of.
    """
    plain = {path: leaf for path, leaf in paths(tree, is_implicit).items() if not is_implicit(leaf)}
    whole = set(select(also, plain, "also"))

    def label(keys: Any, leaf: Any) -> Any:
        if is_implicit(leaf):
            return label_leaf(leaf)
        return "whole" if path_of(keys) in whole else "frozen"

    return jax.tree_util.tree_map_with_path(label, tree, is_leaf=is_implicit)


def label_leaf(leaf: Any) -> Any:
    """The leaf itself with labels for its arrays; a weight that is a leaf in turn is labelled by its own."""
    children = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if not f.metadata.get("static")}

    fixed, called = getattr(leaf, "fixed", ()), getattr(leaf, "called", {})

    def of(name: str, value: Any) -> Any:
        trains = name in leaf.trainable
        if isinstance(value, dict) and trains:
            return {
                part: of(name, x) if part not in fixed else "frozen"
                for part, x in cast("dict[str, Any]", value).items()
            }

        def label(x: Any) -> Any:
            return label_leaf(x) if is_implicit(x) else called.get(name, name) if trains else "frozen"

        return jax.tree.map(label, value, is_leaf=is_implicit)

    return dataclasses.replace(leaf, **{name: of(name, value) for name, value in children.items()})


def trainable_mask(tree: Any, also: Targets = ()) -> Any:
    """`tree` with True for each array that trains and False for each that is frozen.

    also: as for `trainable_labels`, and it raises what that raises.
    """

    def trains(label: str) -> bool:
        return label != "frozen"

    return jax.tree.map(trains, trainable_labels(tree, also))


def keep() -> optax.GradientTransformation:
    """Updates that change nothing, not even the sign of a zero: w + (-0.0) is w for every w. No state.

    The gradients of integers (`jax.grad(..., allow_int=True)`: a quantised weight's codes) become zeros.
    """

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def zero(update: Any) -> jax.Array:
        if update.dtype == jax.dtypes.float0:
            return jnp.broadcast_to(jnp.asarray(0), update.shape)  # of a weak type: the sum has that of the codes
        return jnp.full_like(update, -0.0)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(zero, updates), state

    return optax.GradientTransformation(init, update)


def only_trainable(tx: optax.GradientTransformation, also: Targets = ()) -> optax.GradientTransformation:
    """`tx` for what trains in a combined tree, `keep()` for the rest: no state exists for a frozen weight.

    also: as for `trainable_labels`. What `init` and `update` are given must have a plain leaf for each: they raise
    ValueError otherwise.
    """
    also = also if isinstance(also, str) or callable(also) else tuple(also)  # read at every `init` and `update`

    def name(on: bool) -> str:
        return "train" if on else "frozen"

    def labels(tree: Any) -> Any:
        return jax.tree.map(name, trainable_mask(tree, also))

    return optax.partition({"train": tx, "frozen": keep()}, labels)
