"""Beam search with a length penalty, as one compiled loop; scores and stopping as in transformers.

Axes: b batch, k beams, c candidates, t all tokens, v vocabulary. Beams of a row lie together in the model's batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.generate import GenerateConfig, forward, read
from jlora.sampling import forbid

LOW = -1e9


class Beams(NamedTuple):
    """Running beams (tokens [b, k, t], scores [b, k]), finished ones (scores over length), and the cache."""

    length: jax.Array
    tokens: jax.Array
    scores: jax.Array
    done_tokens: jax.Array
    done_scores: jax.Array
    done_length: jax.Array
    is_done: jax.Array
    open: jax.Array
    logits: jax.Array
    cache: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def beam_search(
    model: Any, config: GenerateConfig, params: Any, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best beam of each row: (new tokens i32 [b, n], which are real bool [b, n]). tokens, mask: [b, p].

    A row stops once no running beam, at its present length, beats its worst finished one.
    """
    (b, p), k = tokens.shape, config.beams
    size = p + config.max_new_tokens
    logits, cache = read(model, config.max_new_tokens, params, tokens, mask)
    cache = on_rows(lambda x, axis: jnp.repeat(x, k, axis=axis), cache)
    real = jnp.repeat(jnp.pad(mask, ((0, 0), (0, size - p)), constant_values=True), k, axis=0)
    padded = jnp.repeat(jnp.pad(tokens, ((0, 0), (0, size - p)))[:, None], k, axis=1)
    state = Beams(
        length=jnp.asarray(p),
        tokens=padded,
        # all beams begin alike: only the first may be continued at first
        scores=jnp.zeros((b, k)).at[:, 1:].set(LOW),
        done_tokens=padded,
        done_scores=jnp.full((b, k), LOW),
        done_length=jnp.full((b, k), size),
        is_done=jnp.zeros((b, k), bool),
        open=jnp.ones((b, 1), bool),
        logits=jnp.repeat(logits, k, axis=0),
        cache=cache,
    )

    def going(s: Beams) -> jax.Array:
        return (s.length < size) & jnp.any(s.open)

    def advance(s: Beams) -> Beams:
        flat = s.tokens.reshape(b * k, size)
        logs = forbid(jax.nn.log_softmax(s.logits), flat, real, s.length, config)
        total = (logs.reshape(b, k, -1) + s.scores[..., None]).reshape(b, -1)
        # so many that k are left if the best of each beam end
        best, index = jax.lax.top_k(total, min(max(2, 1 + len(config.end)) * k, total.shape[1]))
        vocabulary = s.logits.shape[-1]
        origin, new = index // vocabulary, (index % vocabulary).astype(s.tokens.dtype)
        longer = jnp.take_along_axis(s.tokens, origin[..., None], axis=1)
        longer = jax.lax.dynamic_update_slice(longer, new[..., None], (0, 0, s.length))
        ended = jnp.isin(new, jnp.asarray(config.end, new.dtype)) | (s.length + 1 >= size)

        # finished: only the first k candidates count, by score over length
        counts = ended & (jnp.arange(best.shape[1]) < k) & s.open
        marks = jnp.where(counts, best / (s.length + 1 - p) ** config.length_penalty, LOW)
        scores = jnp.concatenate([s.done_scores, marks], axis=1)
        done_scores, keep = jax.lax.top_k(scores, k)
        lengths = jnp.concatenate([s.done_length, jnp.full(best.shape, s.length + 1)], axis=1)
        everything = jnp.concatenate([s.done_tokens, longer], axis=1)
        is_done = jnp.take_along_axis(jnp.concatenate([s.is_done, counts], axis=1), keep, axis=1)

        # running: the best k that have not ended
        running, next_ = jax.lax.top_k(jnp.where(ended, best + LOW, best), k)
        origin = jnp.take_along_axis(origin, next_, axis=1)
        rows = (origin + k * jnp.arange(b)[:, None]).reshape(-1)
        # on CPUs a gather that need not look for indices out of bounds takes half the time
        taken = lambda x, axis: x.at[(slice(None),) * axis + (rows,)].get(mode="promise_in_bounds")
        cache = on_rows(taken, s.cache)
        last = jnp.take_along_axis(new, next_, axis=1).reshape(-1, 1)
        logits, cache = forward(model, params, last, jnp.ones(last.shape, bool), cache)

        bound = running[:, :1] / (s.length + 1 - p) ** config.length_penalty
        worst = jnp.where(is_done, done_scores.min(axis=1, keepdims=True), LOW)
        return Beams(
            length=s.length + 1,
            tokens=jnp.take_along_axis(longer, next_[..., None], axis=1),
            scores=running,
            done_tokens=jnp.take_along_axis(everything, keep[..., None], axis=1),
            done_scores=done_scores,
            done_length=jnp.take_along_axis(lengths, keep, axis=1),
            is_done=is_done,
            open=s.open & jnp.any(bound > worst, axis=1, keepdims=True),
            logits=logits,
            cache=cache,
        )

    out = jax.lax.while_loop(going, advance, state)
    return out.done_tokens[:, 0, p:], jnp.arange(p, size) < out.done_length[:, :1]


def on_rows(f: Any, cache: Any) -> Any:
    """`f(array, its batch axis)` on every array of a cache: keys and values are [..., b, g, t, k]."""
    kv = jax.tree.map(lambda x: f(x, x.ndim - 4), cache["kv"])
    return {**cache, "kv": kv, "mask": f(cache["mask"], 0)}
