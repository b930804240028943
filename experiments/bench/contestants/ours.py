"""jlora as its trainer does it: `lift`, `answer_sums`, `make_train_step`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

import jlora
from experiments.bench.config import Case
from experiments.bench.contestants.jax_step import compiled, shifted
from jlora.io import load
from jlora.train import answer_sums, init_state, make_train_step


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A batch as `data.collate` makes it, every token a label."""
    b, s = tokens.shape
    return {
        "tokens": tokens,
        "mask": np.ones((b, s), bool),
        "positions": np.arange(b * s, dtype=np.int32),
        "labels": shifted(tokens).reshape(-1),
        "weights": np.ones(b * s, np.float32),
        "example": np.repeat(np.arange(b, dtype=np.int32), s),
    }


def base_of(case: Case, folder: str) -> Any:
    """The model; with `case.vocab` its first rows of the embedding, or these again and again."""
    base = load(folder, remat={"none": False, "full": True}.get(case.remat, case.remat))
    if not case.vocab:
        return base.model, base.params, base.layouts
    import dataclasses

    config = dataclasses.replace(base.config, vocab_size=case.vocab)
    rows = np.resize(np.asarray(base.params["embed_tokens"]["embedding"]), (case.vocab, base.config.hidden_size))
    params = {**base.params, "embed_tokens": {"embedding": jax.numpy.asarray(rows)}}
    return base.model.clone(config=config), params, base.layouts


def prepare(case: Case, folder: str, tokens: np.ndarray, options: dict[str, str], attach: Any = jlora.combine) -> Any:
    """`attach`(frozen, lora): the weights of the step."""
    import dataclasses

    case = dataclasses.replace(case, remat=options.get("remat", case.remat))
    model, params, layouts = base_of(case, folder)
    frozen, lora = jlora.lorafy(
        params, case.rank, alpha=case.alpha, targets=list(case.targets), key=jax.random.key(0), layouts=layouts
    )
    sums = jlora.lift(answer_sums(model, case.chunk), strict=True)
    tx = optax.adamw(case.learning_rate, weight_decay=0.0)
    step = make_train_step(lambda lora, frozen, batch, key: sums(attach(frozen, lora), batch), tx)
    return compiled(step, init_state(lora, tx), frozen, batch_of(tokens))
