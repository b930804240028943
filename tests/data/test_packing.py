"""Packed rows: every example once, the same loss as without, and no token that sees another document."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jlora.data import BatchSource, Example, PackedSource, pack
from jlora.models.llama import Llama, LlamaConfig
from jlora.train import answer_sums
from jlora.train.loss import Sums

RNG = np.random.default_rng(0)
SIZES = RNG.integers(3, 14, 25)
EXAMPLES = [Example(RNG.integers(1, 31, n).astype(np.int32), np.arange(n) >= n - RNG.integers(1, 3)) for n in SIZES]
MODEL = Llama(LlamaConfig(31, 32, 48, 2, 4, 2, 8))
PARAMS = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def total(source):
    sums = jax.jit(answer_sums(MODEL))
    parts = [sums(PARAMS, source[n]) for n in range(source.per_epoch)]
    return Sums(*(float(sum(field)) for field in zip(*parts, strict=True)))


def test_rows_hold_everything_once_and_fit():
    rows = pack(SIZES.tolist(), list(range(25)), 20)
    assert sorted(n for row in rows for n in row) == list(range(25))
    assert all(SIZES[row].sum() <= 20 for row in rows)
    assert len(rows) <= 1.25 * SIZES.sum() / 20 + 1


def test_the_loss_is_that_of_the_examples_by_themselves():
    packed, plain = PackedSource(EXAMPLES, 3, 20, steps=9), BatchSource(EXAMPLES, 5, [16])
    got, want = total(packed), total(plain)
    assert got.tokens == want.tokens and got.examples == want.examples == 25
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert {packed[n]["tokens"].shape for n in range(9)} == {(3, 20)}
    again = PackedSource(EXAMPLES, 3, 20, steps=9)
    np.testing.assert_array_equal(packed[7]["tokens"], again[7]["tokens"])
    assert not np.array_equal(packed[0]["tokens"], packed[packed.per_epoch]["tokens"])


def test_no_token_sees_another_document():
    batch = PackedSource(EXAMPLES, 1, 40)[0]
    segments = batch["segments"][0]
    assert segments.max() >= 3
    table = PARAMS["embed_tokens"]["embedding"]

    def influence(x, at):  # d hidden[at] / d every input embedding
        def hidden(x):
            ids = jnp.arange(x.shape[0])[None]  # a table of this row's own embeddings, one a position
            params = {**PARAMS, "embed_tokens": {"embedding": x}}
            options = {"segment_ids": batch["segments"], "positions": batch["places"]}
            wide = Llama(LlamaConfig(40, 32, 48, 2, 4, 2, 8))
            return wide.apply({"params": params}, ids, method="hidden", **options)[0, at].sum()

        return jnp.abs(jax.grad(hidden)(x)).sum(-1)

    x = table[batch["tokens"][0]]
    for segment in range(1, segments.max() + 1):
        last = np.flatnonzero(segments == segment)[-1]
        np.testing.assert_array_equal(np.asarray(influence(x, last)) > 0, segments == segment)
