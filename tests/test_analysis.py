"""Spectra and subspaces against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora.analysis import amplification, similarity, spectrum
from jlora.lora import LoraFactors

KEYS = jax.random.split(jax.random.key(0), 4)


def test_the_spectrum_is_that_of_the_product():
    a, b = jax.random.normal(KEYS[0], (3, 4, 5, 2)), jax.random.normal(KEYS[1], (3, 2, 6))
    got = spectrum(LoraFactors(a, b, 0.5, "siio"))
    want = [
        np.linalg.svd(0.5 * np.asarray(x.reshape(20, 2) @ y), compute_uv=False)[:2] for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_similarity_is_one_within_a_subspace_and_zero_across():
    q = jnp.linalg.qr(jax.random.normal(KEYS[2], (9, 6)))[0]
    one, other = q[:, :3] * jnp.array([3.0, 2.0, 1.0]), q[:, 3:] * jnp.array([3.0, 2.0, 1.0])
    assert abs(float(similarity(one, one, 2, 3)) - 1) < 1e-5
    assert float(similarity(one, other, 3, 3)) < 1e-9
    mixed = jnp.stack([q[:, 0], q[:, 4]], 1) * jnp.array([2.0, 1.0])
    assert abs(float(similarity(one, mixed, 3, 2)) - 0.5) < 1e-5


def test_amplification_of_directions_the_weight_has_weakly():
    q = jnp.linalg.qr(jax.random.normal(KEYS[3], (6, 6)))[0]
    w = 5.0 * jnp.outer(q[:, 0], q[:, 0]) + 0.5 * jnp.outer(q[:, 1], q[:, 1])
    found = amplification(w, q[:, 1:2], q[:, 1:2].T, 4.0, 1)
    assert abs(float(found["task"]) - 0.5) < 1e-5 and abs(float(found["factor"]) - 8.0) < 1e-4
