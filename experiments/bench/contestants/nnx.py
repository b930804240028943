"""Flax NNX's LoRA layers (`nnx.LoRALinear`) in the hand-written Llama: one stack of modules, scanned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench import llama
from experiments.bench.contestants.jax_step import adamw_state, adamw_step, compiled, shifted


def prepare(case: Any, folder: str, tokens: np.ndarray, options: dict[str, str]) -> Any:
    params = llama.read_folder(folder)
    graphs, trained, frozen = {}, {}, {}
    for name in case.targets:
        count, rows, columns = params["layers"][name].shape
        module = nnx.LoRALinear(rows, columns, lora_rank=case.rank, use_bias=False, rngs=nnx.Rngs(0))
        graphs[name], one, rest = nnx.split(module, nnx.LoRAParam, ...)
        trained[name] = jax.tree.map(lambda a, count=count: jnp.stack([a] * count), one)
        frozen[name] = jax.tree.map(lambda a, name=name: params["layers"][name], rest)  # the kernel alone

    def linear(x: jax.Array, w: Any, name: str) -> jax.Array:
        if name not in graphs:
            return x @ w[name]
        return nnx.merge(graphs[name], w["trained"][name], w["frozen"][name])(x)

    for name in case.targets:
        del params["layers"][name]

    def loss(trained: Any, frozen: Any, params: Any, tokens: Any, labels: Any) -> Any:
        layers = {**params["layers"], "trained": trained, "frozen": frozen}
        return llama.loss(params["embed"], params["norm"], layers, tokens, labels, linear)

    step = adamw_step(loss, case.learning_rate)
    return compiled(step, adamw_state(trained), frozen, params, tokens, shifted(tokens))
