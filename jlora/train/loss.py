"""The conditional language-modelling loss (Hu et al., section 2): -log p(answer | prompt), answers only.

Hidden states are gathered at the label positions before the head, and the head runs in chunks that the backward pass
computes again, so no more than one [chunk, vocabulary] array of logits is alive at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax


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


def chunked_sums(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    chunk: int,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(loss, right), each f32 [l], of `labels` i32 [l] under `head(hidden[n])` [v], `chunk` labels at a time.

    The loss is -log p, of a label that keeps 1 - `smoothing` of its weight (Szegedy et al. 2016; the rest is spread
    over the vocabulary), plus `z_loss` * log(Z)^2, which holds the logits down (Chowdhery et al. 2022).
    """

    def one(hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = head(hidden).astype(jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if smoothing or z_loss:
            log_z = jax.nn.logsumexp(logits, axis=-1)
            nll = (1 - smoothing) * nll + smoothing * (log_z - logits.mean(axis=-1)) + z_loss * log_z**2
        return nll, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)

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


def answer_sums(
    model: Any, chunk: int = 512, smoothing: float = 0.0, z_loss: float = 0.0
) -> Callable[[Any, dict[str, jax.Array]], Sums]:
    """f(params, batch) -> `Sums` for a decoder with the methods `hidden` and `head`; `batch` as `data.collate` makes.

    smoothing, z_loss: as in `chunked_sums`; for training, not for evaluation.
    A plain function of params: give it to `jlora.lift` to run it on adapted weights.
    """

    def sums(params: Any, batch: dict[str, jax.Array]) -> Sums:
        variables = {"params": params}
        packed = {"segment_ids": batch["segments"], "positions": batch["places"]} if "segments" in batch else {}
        hidden = model.apply(variables, batch["tokens"], mask=batch["mask"], method="hidden", **packed)
        picked = hidden.reshape(-1, hidden.shape[-1])[batch["positions"]]
        head = lambda h: model.apply(variables, h, method="head")
        nll, right = chunked_sums(head, picked, batch["labels"], chunk, smoothing, z_loss)
        weights = batch["weights"]
        example = batch["example"]
        count = example.shape[0] + 1  # every example has a label; one more for the slots that hold none
        labels = jax.ops.segment_sum(weights, example, count)
        wrong = jax.ops.segment_sum(weights * (1 - right), example, count)
        has = labels > 0
        earlier = jnp.concatenate([jnp.full((1,), -1, example.dtype), example[:-1]])
        first = (weights > 0) & (example != earlier)
        return Sums(
            loss=jnp.sum(nll * weights),
            tokens=jnp.sum(weights),
            right=jnp.sum(right * weights),
            exact=jnp.sum((has & (wrong == 0)).astype(jnp.float32)),
            first=jnp.sum(first * right),
            examples=jnp.sum(has.astype(jnp.float32)),
        )

    return sums
