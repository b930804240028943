"""qwix's LoRA provider on the same Flax model, loss and optimiser as ours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import qwix

from experiments.bench.contestants.jax_step import compiled
from experiments.bench.contestants.ours import base_of, batch_of
from jlora.train import answer_sums


def prepare(case: Any, folder: str, tokens: np.ndarray, options: dict[str, str]) -> Any:
    model, params, _ = base_of(case, folder)
    provider = qwix.LoraProvider(module_path=f".*({'|'.join(case.targets)})", rank=case.rank, alpha=case.alpha)
    adapted = qwix.apply_lora_to_model(model, provider, methods=("__call__", "hidden"))
    made = adapted.init(jax.random.key(0), tokens[:1, :1])["params"]
    paths = jax.tree_util.tree_flatten_with_path(made)[0]
    lora = {path: leaf for path, leaf in paths if "lora" in jax.tree_util.keystr(path)}
    plain = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    frozen = {path: plain[jax.tree_util.keystr(path)] for path, _ in paths if path not in lora}
    treedef = jax.tree.structure(made)
    names = [path for path, _ in paths]
    trained = [leaf for _, leaf in sorted(lora.items(), key=lambda item: jax.tree_util.keystr(item[0]))]
    order = sorted(lora, key=jax.tree_util.keystr)
    sums = answer_sums(adapted, case.chunk)
    tx = optax.adamw(case.learning_rate, weight_decay=0.0)
    held = [frozen.get(name) for name in names]

    def loss(trained: Any, held: Any, batch: Any) -> Any:
        factors = dict(zip(order, trained, strict=True))
        leaves = [factors.get(name, leaf) for name, leaf in zip(names, held, strict=True)]
        found = sums(jax.tree.unflatten(treedef, leaves), batch)
        return found.loss / found.tokens

    def step(state: Any, held: Any, batch: Any) -> Any:
        trained, opt = state
        value, grads = jax.value_and_grad(loss)(trained, held, batch)
        updates, opt = tx.update(grads, opt, trained)
        return (optax.apply_updates(trained, updates), opt), value

    return compiled(step, (trained, tx.init(trained)), held, batch_of(tokens))
