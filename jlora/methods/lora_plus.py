"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv 2402.12354).

lr(B) = ratio * lr(A); the paper advises a ratio near 16. Departure: whatever else trains has A's rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax

from jlora.leaves import is_implicit
from jlora.lora import LoraFactors
from jlora.methods.fused import FusedFactors
from jlora.optim import keep, trainable_labels


def labels(tree: Any) -> Any:
    """ "a", "b" or "frozen" for each array of a trained tree, or of a combined one (`jlora.combine`)."""
    if any(map(is_implicit, jax.tree.leaves(tree, is_leaf=is_implicit))):
        names = {"lora_b": "b", "frozen": "frozen"}
        return jax.tree.map(lambda label: names.get(label, "a"), trainable_labels(tree))

    def pair(entry: Any) -> bool:
        return isinstance(entry, LoraFactors | FusedFactors)

    def at(entry: Any) -> Any:
        return dataclasses.replace(entry, lora_a="a", lora_b="b") if pair(entry) else "a"

    return jax.tree.map(at, tree, is_leaf=pair)


def lora_plus(
    make_tx: Callable[[float], optax.GradientTransformation], learning_rate: float, ratio: float = 16.0
) -> optax.GradientTransformation:
    """The optimiser `make_tx(rate)` (`optax.adamw`, say) at `learning_rate`, and at `ratio` times that for every B."""
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "a": make_tx(learning_rate),
        "b": make_tx(ratio * learning_rate),
        "frozen": keep(),
    }
    return optax.partition(transforms, labels)
