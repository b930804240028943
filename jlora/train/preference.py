"""Learning from pairs: DPO (Rafailov et al. 2023) and ORPO (Hong et al. 2024).

DPO's reference is the frozen tree itself, the adapter off: no second model is held. So a method must leave the base in
there as it was, and start as the base does: the loss of a pair is log 2 then. Or it is the frozen tree under the
adapter that training goes on from, whose factors alone are held beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.data.batches import Batch, BatchSource, collate, label_count
from jlora.data.tokens import Example
from jlora.methods.columns import Filled, Prefixed
from jlora.train.loss import Sums, example_sums


def dpo(chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, beta: float) -> Any:
    """(loss, margin), each [b], of summed log-probabilities [b]: -log sigmoid(beta * margin), equation 7."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -jax.nn.log_sigmoid(beta * margin), margin


def orpo(chosen: jax.Array, rejected: jax.Array, weight: float) -> Any:
    """(loss, margin), each [b], of log-probabilities [b] a token: -chosen - weight * log sigmoid(log odds ratio),
    equations 6 and 7; odds = p / (1 - p)."""
    odds = lambda logp: logp - jnp.log(-jnp.expm1(jnp.minimum(logp, -1e-6)))
    margin = odds(chosen) - odds(rejected)
    return -chosen - weight * jax.nn.log_sigmoid(margin), margin


def preference_sums(
    model: Any, kind: str, beta: float = 0.1, dropout: float = 0.0, started: bool = False
) -> Callable[[Any, Any, Any, Any], Sums]:
    """f(trained, frozen, batch, key) -> `Sums` over the pairs of `PairSource`: `loss` summed, `tokens` and `examples`
    the pairs, the others those whose chosen answer leads. kind: "dpo" or "orpo"; beta: DPO's, or ORPO's weight.
    dropout: of the adapter's input, where a key is given. started: `frozen` is then (frozen, start), and DPO's
    reference the model under the trained tree `start`.

    Raises ValueError for another kind, and for DPO from the base where a leaf is trained whole, so that its reference
    would be lost, or with a prefix, behind which the model does not start as the base.
    """
    if kind not in ("dpo", "orpo"):
        raise ValueError(f"preference loss {kind!r} is not known: dpo, orpo are")
    if kind == "dpo" and not started and isinstance(model, Prefixed | Filled):
        raise ValueError("dpo starts at the base, its reference, and a prefix does not: use method lora, or loss orpo")
    lifted = jlora.lift(example_sums(model))

    def pairs(params: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
        each: Any = lifted(params, batch)
        count = batch["tokens"].shape[0]
        logp, size = -each.loss[:count], each.tokens[:count]
        return logp[::2], logp[1::2], size[::2], size[1::2]

    def sums(trained: Any, frozen: Any, batch: Any, key: Any) -> Sums:
        frozen, start = frozen if started else (frozen, None)
        drop = dropout if key is not None else 0.0
        params = jlora.combine(frozen, trained, dropout=drop, key=key if drop else None)
        chosen, rejected, size, other = pairs(params, batch)
        if kind == "dpo":
            reference = jlora.combine(frozen, start) if started else frozen
            if not started and any(leaf is None for leaf in jax.tree.leaves(frozen, is_leaf=lambda leaf: leaf is None)):
                raise ValueError("dpo needs the base as its reference: train no weight whole, or use loss orpo")
            first, second = map(jax.lax.stop_gradient, pairs(reference, batch)[:2])
            loss, margin = dpo(chosen, rejected, first, second, beta)
        else:
            loss, margin = orpo(chosen / jnp.maximum(size, 1), rejected / jnp.maximum(other, 1), beta)
        there = (size > 0).astype(jnp.float32)
        leads, count = jnp.sum(there * (margin > 0)), jnp.sum(there)
        return Sums(loss=jnp.sum(there * loss), tokens=count, right=leads, exact=leads, first=leads, examples=count)

    return sums


class PairSource(BatchSource):
    """A `BatchSource` of (chosen, rejected) pairs: rows 2n and 2n + 1 of a batch [2b, s] are the n-th pair's."""

    def __init__(self, pairs: Sequence[tuple[Example, Example]], batch: int, lengths: Sequence[int], **options: Any):
        super().__init__([max(pair, key=lambda e: len(e.tokens)) for pair in pairs], batch, lengths, **options)
        self.pairs = pairs
        counts = [label_count(chosen) + label_count(rejected) for chosen, rejected in pairs]
        # the sums by example have as many entries as there are labels: at least one a row
        self.labels = [max(room, 2 * batch) for room in self.room(counts)]

    def collated(self, chosen: np.ndarray, bucket: int) -> Batch:
        rows = [example for i in chosen for example in self.pairs[i]]
        return collate(rows, 2 * self.batch, self.lengths[bucket], self.labels[bucket], self.pad)
