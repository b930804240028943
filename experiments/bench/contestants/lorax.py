"""lorax (jax-lorax) on the hand-written Llama, whose layers come one after another; needs a JAX of 2024."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import lorax
import numpy as np

from experiments.bench import llama
from experiments.bench.contestants.jax_step import adamw_state, adamw_step, compiled, shifted


def prepare(case: Any, folder: str, tokens: np.ndarray, options: dict[str, str]) -> Any:
    params = llama.read_folder(folder)
    stacked = params.pop("layers")
    layers = [{name: array[n] for name, array in stacked.items()} for n in range(llama.Sizes().layers)]
    spec = [{name: case.rank if name in case.targets else lorax.LORA_FREEZE for name in layer} for layer in layers]
    trained, frozen = split(lorax.init_lora(layers, spec, jax.random.PRNGKey(0), alpha=case.alpha))

    def plain(layers: Any, params: Any, tokens: Any, labels: Any) -> Any:
        # not `x @ w`: jnp's product is jitted, which qax does not enter here
        linear = lambda x, w, name: jax.lax.dot_general(x, w[name], (((2,), (0,)), ((), ())))
        return llama.loss(params["embed"], params["norm"], layers, tokens, labels, linear, scan=False)

    lifted = lorax.lora(plain)

    def loss(trained: Any, frozen: Any, params: Any, tokens: Any, labels: Any) -> Any:
        return lifted(joined(trained, frozen), params, tokens, labels)

    step = adamw_step(loss, case.learning_rate)
    return compiled(step, adamw_state(trained), frozen, params, tokens, shifted(tokens))


def is_weight(leaf: Any) -> bool:
    return isinstance(leaf, lorax.LoraWeight)


def split(layers: Any) -> Any:
    """([(a, b) of each adapted weight], the layers)."""
    leaves = jax.tree_util.tree_leaves(layers, is_leaf=is_weight)
    return [(leaf.a, leaf.b) for leaf in leaves if is_weight(leaf)], layers


def joined(trained: Any, layers: Any) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten(layers, is_leaf=is_weight)
    factors = iter(trained)

    def at(leaf: Any) -> Any:
        if not is_weight(leaf):
            return leaf
        a, b = next(factors)
        return dataclasses.replace(leaf, a=a, b=b)

    return jax.tree_util.tree_unflatten(treedef, [at(leaf) for leaf in leaves])
