"""The conditional language-modelling loss (Hu et al., section 2): -log p(answer | prompt), answers only.

Hidden states are gathered at the label positions before the head, and the head runs in chunks that the backward pass
computes again; the gradient of a chunk's logits takes their place, so one [chunk, vocabulary] array is alive at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

WORDS = ("embed_tokens", "wte", "word_embeddings")
"""What families call the embedding of their tokens."""


class Sums(NamedTuple):
    """Sums over labels and examples; ratios are taken at the end, so batches of any size add up exactly.

    `loss`: summed negative log-likelihood in nats; `tokens`: labels; `right`: labels that argmax names;
    `exact`: examples whose every label argmax names; `first`: examples whose first label it names; `examples`.
    """

    loss: jax.Array | float
    tokens: jax.Array | float
    right: jax.Array | float
    exact: jax.Array | float
    first: jax.Array | float
    examples: jax.Array | float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def label_loss(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, z_loss: float = 0.0) -> jax.Array:
    """f32 [n]: -log p of `labels` i32 [n] under `logits` f32 [n, v], a label keeping 1 - `smoothing` of its weight
    (Szegedy et al. 2016; the rest is spread over the vocabulary), plus `z_loss` * log(Z)^2, which holds the logits down
    (Chowdhery et al. 2022). Its own gradient rule, because jax's needs a second [n, v] array.
    """
    return label_loss_forward(logits, labels, smoothing, z_loss)[0]


def label_loss_forward(logits: jax.Array, labels: jax.Array, smoothing: float, z_loss: float) -> tuple[jax.Array, Any]:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = log_z - (1 - smoothing) * jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    if smoothing:
        loss -= smoothing * logits.mean(axis=-1)
    return loss + z_loss * log_z**2 if z_loss else loss, (logits, log_z, labels)


def label_loss_backward(smoothing: float, z_loss: float, kept: Any, ct: jax.Array) -> tuple[jax.Array, None]:
    logits, log_z, labels = kept
    hit = (jnp.arange(logits.shape[-1]) == labels[:, None]).astype(logits.dtype)
    p = jnp.exp(logits - log_z[:, None])
    slope = p * (1 + 2 * z_loss * log_z[:, None]) - (1 - smoothing) * hit - smoothing / logits.shape[-1]
    return ct[:, None] * slope, None


label_loss.defvjp(label_loss_forward, label_loss_backward)  # pyright: ignore[reportFunctionMemberAccess]


def named(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """bool [n]: whether argmax of `logits` [n, v] is the label, with no index carried along, for which XLA for CPUs
    takes as long as for the rest of the loss."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    return ~jnp.any(~(logits <= own) | (earlier & (logits == own)), axis=-1)  # what is not a number is not named


def chunked_sums(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    chunk: int,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(`label_loss`, right), each f32 [l], of `labels` i32 [l] under `head(hidden[n])` [v], `chunk` at a time."""

    def one(hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("loss"):  # `profile` knows it by this name
            logits = head(hidden).astype(jnp.float32)
            right = named(lax.stop_gradient(logits), labels).astype(jnp.float32)
            return label_loss(logits, labels, smoothing, z_loss), right

    size = labels.shape[0]
    if size <= chunk:
        return one(hidden, labels)
    count = -(-size // chunk)
    pad = count * chunk - size
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(count, chunk, -1)
    parts = (hidden, jnp.pad(labels, (0, pad)).reshape(count, chunk))
    again = jax.checkpoint(one, prevent_cse=False)
    _, (nll, right) = lax.scan(lambda carry, part: (carry, again(*part)), None, parts)
    return nll.reshape(-1)[:size], right.reshape(-1)[:size]


def example_sums(
    model: Any, chunk: int = 512, smoothing: float = 0.0, z_loss: float = 0.0, neftune: float = 0.0
) -> Callable[..., Sums]:
    """f(params, batch, key=None) -> `Sums` of arrays [l], one entry an example (the rest 0), for a decoder with the
    methods `hidden` and `head`; `batch` as `data.collate` makes.

    smoothing, z_loss: as in `chunked_sums`; neftune: as in `noisy`, where a key is given. For training only.
    A plain function of params: give it to `jlora.lift` to run it on adapted weights.
    """

    def sums(params: Any, batch: dict[str, jax.Array], key: Any = None) -> Sums:
        variables = {"params": params}
        packed = {"segment_ids": batch["segments"], "positions": batch["places"]} if "segments" in batch else {}
        with noisy(neftune, key, batch["mask"]):
            hidden = model.apply(variables, batch["tokens"], mask=batch["mask"], method="hidden", **packed)
        picked = hidden.reshape(-1, hidden.shape[-1])[batch["positions"]]
        head = lambda h: model.apply(variables, h, method="head")
        nll, right = chunked_sums(head, picked, batch["labels"], chunk, smoothing, z_loss)
        weights, example = batch["weights"], batch["example"]
        count = example.shape[0] + 1  # every example has a label; one more for the slots that hold none
        add = lambda x: jax.ops.segment_sum(x, example, count)
        labels, wrong = add(weights), add(weights * (1 - right))
        earlier = jnp.concatenate([jnp.full((1,), -1, example.dtype), example[:-1]])
        first = (weights > 0) & (example != earlier)
        return Sums(
            loss=add(nll * weights),
            tokens=labels,
            right=add(right * weights),
            exact=((labels > 0) & (wrong == 0)).astype(jnp.float32),
            first=add(first * right),
            examples=(labels > 0).astype(jnp.float32),
        )

    return sums


def answer_sums(
    model: Any, chunk: int = 512, smoothing: float = 0.0, z_loss: float = 0.0, neftune: float = 0.0
) -> Callable[..., Sums]:
    """f(params, batch, key=None) -> `Sums` of the whole batch; the rest as in `example_sums`."""
    each = example_sums(model, chunk, smoothing, z_loss, neftune)
    return lambda params, batch, key=None: Sums(*(jnp.sum(x) for x in each(params, batch, key)))


@contextmanager
def noisy(alpha: float, key: Any, mask: jax.Array) -> Iterator[None]:
    """NEFTune (Jain et al. 2023): uniform noise in +-alpha / sqrt(n * d) on what the embedding, one of `WORDS`, gives
    for the tokens of mask bool [b, s], n real tokens an example. Nothing where alpha is 0 or there is no key."""
    if not alpha or key is None:
        yield
        return

    def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        x = call(*args, **kwargs)
        if context.module.name not in WORDS or context.method_name != "__call__":
            return x
        size = alpha / jnp.sqrt(jnp.maximum(mask.sum(-1), 1) * x.shape[-1])[:, None, None]
        return x + (size * jax.random.uniform(key, x.shape, minval=-1, maxval=1)).astype(x.dtype)

    with nn.intercept_methods(add):
        yield
