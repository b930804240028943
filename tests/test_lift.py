"""`lift`: the same results as on materialised weights, without materialising."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import LoraLeaf, lift

L, D, R = 3, 8, 2


def leaves():
    k = jax.random.split(jax.random.key(0), 6)
    stack = LoraLeaf(
        jax.random.normal(k[0], (L, D, D)),
        jax.random.normal(k[1], (L, D, R)),
        jax.random.normal(k[2], (L, R, D)),
        a_axes=(0, 1, -1),
        b_axes=(0, -1, 2),
        scaling=0.5,
        path="stack",
    )
    table = LoraLeaf(
        jax.random.normal(k[3], (11, D)),
        jax.random.normal(k[4], (11, R)),
        jax.random.normal(k[5], (R, D)),
        path="table",
    )
    return stack, table


def model(w, table, ids):
    x = table[ids]

    def body(c, w):
        return jax.checkpoint(lambda c: jax.nn.relu(c @ w))(c), None

    y, _ = jax.lax.scan(body, x, w)
    y = jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i].T), y)
    y = jax.lax.cond(y.sum() > 0, lambda: y @ w[0], lambda: y @ w[1].reshape(D, 2, 4).reshape(D, D))
    y = jax.jit(lambda y, w: y @ w)(y, w[2])
    return jnp.einsum("bd,ldk->lbk", y, w), y @ table.T


@pytest.mark.parametrize("jitted", [False, True])
def test_a_model_with_everything_in_it(jitted):
    stack, table = leaves()
    ids = jnp.array([1, 4, 2, 9])
    lifted = lift(model, strict=True)
    outs = (jax.jit(lifted) if jitted else lifted)(stack, table, ids)
    for out, want in zip(outs, model(stack.materialise(), table.materialise(), ids), strict=True):
        np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())
