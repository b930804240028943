"""LoftQ against the algorithm in numpy, and what it is for: a start nearer to the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quant import NF4, Int4, QuantisedLeaf, loftq


def test_codes_and_factors_are_algorithm_1s():
    w = jax.random.normal(jax.random.key(0), (2, 3, 8, 10))  # stacked, and heads
    params = {"q": {"kernel": w}, "other": {"kernel": w[0, 0]}}
    layouts = {"q": "ssio"}
    scheme = Int4(group=4)
    frozen, lora = loftq(params, 3, scheme, alpha=6, iterations=2, targets="q", layouts=layouts)
    entry = lora["q"]["kernel"]
    for at in ((0, 0), (1, 2)):
        m = np.asarray(w[at], np.float32)
        low = np.zeros_like(m)
        for _ in range(2):
            q = np.asarray(scheme.decode(scheme.encode(jnp.asarray(m - low)), 8))
            u, s, vt = np.linalg.svd(m - q)
            low = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(frozen["q"]["kernel"].materialise()[at], q, atol=1e-5)
        np.testing.assert_allclose(2 * entry.lora_a[at] @ entry.lora_b[at], low, atol=1e-4)
    assert isinstance(frozen["other"]["kernel"], QuantisedLeaf) and lora["other"]["kernel"] is None


def test_the_start_is_nearer_to_the_base_than_qloras():
    w = jax.random.normal(jax.random.key(1), (64, 48))
    frozen, lora = loftq({"kernel": w}, 8, NF4())
    f = jlora.lift(lambda p, x: x @ p["kernel"], strict=True)
    x = jnp.eye(64)
    off = lambda got: float(jnp.linalg.norm(got - w))
    assert off(f(jlora.combine(frozen, lora), x)) < 0.9 * off(f(jlora.quantise({"kernel": w}), x))
    with pytest.raises(ValueError, match="LoftQ takes 1 or more"):
        loftq({"kernel": w}, 8, iterations=0)
    with pytest.raises(ValueError, match="init 'pissa' takes its factors out of the base, and LoftQ has"):
        loftq({"kernel": w}, 8, init="pissa")
