"""From logits to the next token: penalties, truncations, the draw. Order and meaning as in transformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

NEVER = -jnp.inf


def forbid(scores: jax.Array, tokens: jax.Array, real: jax.Array, length: Any, config: Any) -> jax.Array:
    """scores f32 [b, v] after the repetition penalty (Keskar et al. 2019) and the ban on repeated n-grams.

    tokens i32 [b, t], real bool [b, t]: what has been read and written; columns from `length` on are empty.
    """
    if config.repetition_penalty != 1.0:
        seen = mark(scores, tokens, real & (jnp.arange(tokens.shape[1]) < length))
        down = jnp.where(scores < 0, scores * config.repetition_penalty, scores / config.repetition_penalty)
        scores = jnp.where(seen, down, scores)
    n = config.no_repeat_ngram
    if n and tokens.shape[1] >= n:
        starts = tokens.shape[1] - n + 1
        begins = jnp.arange(starts)
        same = real[:, :starts] & (begins + n <= length)
        for k in range(n - 1):  # the n-1 last tokens against those at every earlier place
            last = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(length - n + 1 + k, 0), 1, 1)
            same &= tokens[:, k : k + starts] == last
        banned = mark(scores, tokens[:, n - 1 :], same)
        scores = jnp.where(banned, NEVER, scores)
    return scores


def mark(scores: jax.Array, tokens: jax.Array, where: jax.Array) -> jax.Array:
    """bool [b, v]: the tokens i32 [b, s] of the places where `where` [b, s] is True."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros(scores.shape, bool).at[rows, tokens].max(where)


def choose(scores: jax.Array, key: jax.Array, config: Any) -> jax.Array:
    """The next token i32 [b]: the best at temperature 0, else a draw from what the truncations leave."""
    if config.temperature == 0:
        return jnp.argmax(scores, axis=-1)
    return jax.random.categorical(key, truncate(scores / config.temperature, config), axis=-1)


def truncate(scores: jax.Array, config: Any) -> jax.Array:
    """scores f32 [b, v] with -inf outside top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024)."""
    if config.top_k:
        least = jax.lax.top_k(scores, min(config.top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < least, NEVER, scores)
    if config.top_p < 1.0:
        order = jnp.argsort(scores, axis=-1)
        sorted_probs = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
        drop = jnp.cumsum(sorted_probs, axis=-1) <= 1 - config.top_p
        drop = drop.at[:, -1].set(False)
        rows = jnp.arange(scores.shape[0])[:, None]
        scores = jnp.where(jnp.zeros_like(drop).at[rows, order].set(drop), NEVER, scores)
    if config.min_p > 0:
        probs = jax.nn.softmax(scores, axis=-1)
        scores = jnp.where(probs < config.min_p * probs.max(axis=-1, keepdims=True), NEVER, scores)
    return scores
