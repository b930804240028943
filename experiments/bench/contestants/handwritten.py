"""x·W + scaling * (x·A)·B written out by hand in a plain JAX Llama, the frozen weights an argument."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import llama
from experiments.bench.contestants.jax_step import adamw_state, adamw_step, compiled, shifted


def factors_of(layers: Any, targets: Any, rank: int) -> dict[str, Any]:
    """{projection: (A [l, in, r], B [l, r, out] of zeros)}."""
    rng = np.random.default_rng(0)
    made = {}
    for name in targets:
        count, rows, columns = layers[name].shape
        a = rng.uniform(-1, 1, (count, rows, rank)).astype(np.float32) / np.sqrt(rows)
        made[name] = (jnp.asarray(a), jnp.zeros((count, rank, columns)))
    return made


def prepare(case: Any, folder: str, tokens: np.ndarray, options: dict[str, str]) -> Any:
    params = llama.read_folder(folder)
    lora = factors_of(params["layers"], case.targets, case.rank)
    scaling = case.alpha / case.rank

    def linear(x: jax.Array, w: Any, name: str) -> jax.Array:
        y = x @ w[name]
        if name not in w["lora"]:
            return y
        a, b = w["lora"][name]
        return y + scaling * ((x @ a) @ b)

    def loss(lora: Any, params: Any, tokens: Any, labels: Any) -> Any:
        layers = {**params["layers"], "lora": lora}
        return llama.loss(params["embed"], params["norm"], layers, tokens, labels, linear)

    step = adamw_step(loss, case.learning_rate)
    return compiled(step, adamw_state(lora), params, tokens, shifted(tokens))
