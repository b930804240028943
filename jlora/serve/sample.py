"""The next token of each slot, every slot with its own settings: `jlora.sampling.truncate`'s rules on arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.serve.request import Ask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature f32 [b] (0: greedy), top_k i32 [b] (0: all), top_p f32 [b], min_p f32 [b], seed u32 [b]."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any


def sampling(asks: list[Ask]) -> Sampling:
    """Their settings as arrays."""
    column = lambda name, dtype: jnp.asarray([getattr(ask, name) for ask in asks], dtype)
    return Sampling(
        column("temperature", jnp.float32),
        column("top_k", jnp.int32),
        column("top_p", jnp.float32),
        column("min_p", jnp.float32),
        jnp.asarray([ask.seed % 2**32 for ask in asks], jnp.uint32),
    )


def draw(logits: jax.Array, how: Sampling, step: jax.Array) -> jax.Array:
    """i32 [b] from logits f32 [b, v]; step i32 [b] counts a request's tokens, so a seed gives the same answer again."""
    return jax.lax.cond(
        jnp.any(how.temperature > 0), drawn, lambda logits, how, step: jnp.argmax(logits, -1), logits, how, step
    ).astype(jnp.int32)


def drawn(logits: jax.Array, how: Sampling, step: jax.Array) -> jax.Array:
    warm = jnp.where(how.temperature > 0, how.temperature, 1.0)[:, None]
    order = jnp.argsort(-logits, axis=-1)
    scores = jnp.take_along_axis(logits, order, -1) / warm  # the best first
    rank = jnp.arange(scores.shape[-1])
    keep = (how.top_k[:, None] == 0) | (rank < how.top_k[:, None])
    probs = jax.nn.softmax(jnp.where(keep, scores, -jnp.inf), -1)
    keep &= jnp.cumsum(probs, -1) - probs < how.top_p[:, None]
    probs = jnp.where(keep, probs, 0.0)
    keep &= (probs >= how.min_p[:, None] * probs[:, :1]) | (rank == 0)
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(how.seed, step)
    place = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, scores, -jnp.inf))
    token = jnp.take_along_axis(order, place[:, None], -1)[:, 0]
    return jnp.where(how.temperature > 0, token, order[:, 0])
