"""Random subspaces: linear, well scaled, drawn again alike, no projection kept, and a d90 that is found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import hadamard
from toys import TOKENS, encoder

import jlora
from experiments.intrinsic_d90 import d90
from jlora.methods import intrinsic
from jlora.tree import size

KEY = jax.random.key(5)


@pytest.mark.parametrize("name", intrinsic.PROJECTIONS)
@pytest.mark.parametrize("d", [7, 64])
def test_projection(name, d):
    n = 20_000
    project = jax.jit(intrinsic.PROJECTIONS[name], static_argnums=2)
    one, two = jax.random.normal(KEY, (2, d))
    a, b = project(KEY, one, n), project(KEY, two, n)
    assert a.shape == (n,)
    np.testing.assert_array_equal(a, project(KEY, one, n))
    np.testing.assert_allclose(project(KEY, 2 * one - two, n), 2 * a - b, atol=1e-5)
    # lengths and angles are kept: inner products of the projections are those of theta
    gram = np.array([[a @ a, a @ b], [a @ b, b @ b]]) / n * d
    want = np.array([[one @ one, one @ two], [one @ two, two @ two]])
    np.testing.assert_allclose(gram, want, atol=0.1 * want.max())
    back = jax.grad(lambda t: project(KEY, t, n) @ b)(one)
    np.testing.assert_allclose(back @ two, b @ b, rtol=1e-4)
    assert jnp.abs(project(jax.random.key(6), one, n) - a).max() > 1e-2


def test_hadamard_is_orthonormal():
    h = intrinsic.hadamard(jnp.eye(8))
    np.testing.assert_allclose(h @ h.T, jnp.eye(8), atol=1e-6)
    np.testing.assert_allclose(jnp.abs(h), 8**-0.5, rtol=1e-6)
    x = jax.random.normal(KEY, (2, 1024))  # of two factors
    np.testing.assert_allclose(intrinsic.hadamard(x), x @ hadamard(1024) / 32, atol=1e-5)


@pytest.mark.parametrize("m", [2, 8, 2048])
def test_places_are_permutations(m):
    at = np.asarray(intrinsic.places(KEY, 3, m))
    np.testing.assert_array_equal(np.sort(at, 1), np.broadcast_to(np.arange(m), (3, m)))
    if m == 2048:  # of every row its own, and nothing of the order is left
        assert (at[0] == at[1]).mean() < 0.01
        assert abs(np.corrcoef(at[0], np.arange(m))[0, 1]) < 0.1
        assert np.unique(np.diff(at[0].astype(int))).size > m / 4


@pytest.mark.parametrize("name", intrinsic.PROJECTIONS)
@pytest.mark.parametrize("scan", [True, False])
def test_a_model_learns_inside_it(name, scan):
    apply, params = encoder(scan)
    frozen, trained = intrinsic.make(params, 200, projection=name, size=0.05)
    assert size(trained) == 200
    lifted = jlora.lift(apply, strict=True)
    np.testing.assert_array_equal(lifted(jlora.combine(frozen, trained), TOKENS), apply(params, TOKENS))
    labels = TOKENS % 5

    def loss(trained):
        out = lifted(jlora.combine(frozen, trained), TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()

    tx = optax.adam(0.3)

    @jax.jit
    def step(trained, state):
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    state, values = tx.init(trained), []
    for _ in range(60):
        trained, state, value = step(trained, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    merged = jlora.merge(frozen, trained)
    np.testing.assert_allclose(apply(merged, TOKENS), lifted(jlora.combine(frozen, trained), TOKENS), atol=1e-5)
    assert any(jnp.abs(s - 1).max() > 1e-3 for s in jax.tree.leaves(trained.scales))
    assert "200 numbers" not in jlora.summary(frozen, trained)  # theta alone; the scales are beside it
    assert f"{trained.theta.size} numbers, {name}" in jlora.summary(frozen, trained)


def test_no_projection_is_kept():
    """A step's temporaries stay far below n * D numbers, and below the weights' own size times a few."""
    w = {"w": jnp.zeros((512, 512))}
    frozen, trained = intrinsic.make(w, 256, projection="dense", said=False)
    loss = lambda t: jnp.sum(jlora.combine(frozen, t)["w"] ** 2)
    memory = jax.jit(jax.grad(loss)).lower(trained).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 512 * 512 * 256 * 4


@pytest.mark.parametrize("least", [5, 64, 65, 700, 4097])
def test_search_of_d90(least):
    """Against a task whose dimension is known: the interval's ends are right, and close."""
    asked = []
    found, below = d90(lambda d: asked.append(d) or d >= least, 64, 1 << 13, 1.2)
    assert below < least <= found and (least <= 64 or found / below <= 1.2)
    assert len(asked) == len(set(asked)) < 16
    assert d90(lambda d: False, 64, 1000, 1.2) == (None, 512)


def test_refusals():
    w = {"w": jnp.zeros((4, 4))}
    with pytest.raises(ValueError, match="'x' is not known: dense"):
        intrinsic.make(w, 4, projection="x")
    with pytest.raises(ValueError, match="dimension 1: SAID's scales alone are 1"):
        intrinsic.make(w, 1)
