"""What a model writes after a prompt: a few tokens, greedily, for reports."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.io import Pretrained


def answer(base: Pretrained, params: Any, prompt: str, count: int = 8) -> str:
    """Up to `count` tokens or the end of the turn. `params` may hold implicit leaves."""
    ids = base.tokenizer(prompt)["input_ids"]
    tokens = np.zeros((1, len(ids) + count), np.int32)
    tokens[0, : len(ids)] = ids
    logits = jax.jit(jlora.lift(lambda p, t: base.model.apply({"params": p}, t, mask=jnp.ones(t.shape, bool))))
    new: list[int] = []
    for n in range(len(ids), len(ids) + count):
        token = int(jnp.argmax(logits(params, jnp.asarray(tokens))[0, n - 1]))
        if token == base.tokenizer.eos_token_id:
            break
        tokens[0, n] = token
        new.append(token)
    return base.tokenizer.decode(new)
