"""Quax's example `LoraArray` in the hand-written Llama, the function quaxified; its layers one after another."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import numpy as np
import quax
from quax.examples.lora import LoraArray

from experiments.bench import llama
from experiments.bench.contestants.jax_step import adamw_state, adamw_step, compiled, shifted


def prepare(case: Any, folder: str, tokens: np.ndarray, options: dict[str, str]) -> Any:
    params = llama.read_folder(folder)
    layers = []
    for n in range(llama.Sizes().layers):
        weights = {name: array[n] for name, array in params["layers"].items()}
        for number, name in enumerate(case.targets):
            key = jax.random.fold_in(jax.random.key(n), number)
            weights[name] = LoraArray(weights[name].T, rank=case.rank, key=key)
        layers.append(weights)
    is_lora = lambda leaf: isinstance(leaf, LoraArray)
    spec = jax.tree.map(lambda leaf: False, layers)
    factors = lambda leaf: (leaf.a, leaf.b) if is_lora(leaf) else None
    where = lambda tree: [f for leaf in jax.tree.leaves(tree, is_leaf=is_lora) if is_lora(leaf) for f in factors(leaf)]
    spec = eqx.tree_at(where, spec, replace=[True] * len(where(spec)))
    trained, frozen = eqx.partition(layers, spec)

    def linear(x: jax.Array, w: Any, name: str) -> jax.Array:
        if name not in case.targets:
            return x @ w[name]
        flat = x.reshape(-1, x.shape[-1]).T
        y = quax.quaxify(lambda w, x: w @ x)(w[name], flat)
        return y.T.reshape(*x.shape[:-1], -1)

    def loss(trained: Any, frozen: Any, params: Any, tokens: Any, labels: Any) -> Any:
        layers = eqx.combine(trained, frozen)
        return llama.loss(params["embed"], params["norm"], layers, tokens, labels, linear, scan=False)

    del params["layers"]
    step = adamw_step(loss, case.learning_rate)
    return compiled(step, adamw_state(trained), frozen, params, tokens, shifted(tokens))
