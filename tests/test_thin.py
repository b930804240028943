"""The thin product: JAX's own derivatives in every mode, and no copy of the activations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jlora.thin import thin

B, S, D, R = 3, 40, 96, 4
K = jax.random.split(jax.random.key(0), 4)
X, A = jax.random.normal(K[0], (B, S, D)), jax.random.normal(K[1], (D, R))
CASES = {
    "x·A": (X, (7, 8, 0), A, (0, -1), (7, 8, -1), lambda x, a: x @ a),
    "A laid out [r, in]": (X, (7, 8, 0), A.T, (-1, 0), (7, 8, -1), lambda x, a: x @ a.T),
    "experts": (
        X,
        (0, 8, 1),
        jnp.stack([A] * B),
        (0, 1, -1),
        (0, 8, -1),
        lambda x, a: jnp.einsum("eni,eir->enr", x, a),
    ),
    "heads back": (
        X,
        (7, 0, 1),
        jax.random.normal(K[2], (S, D, R)),
        (0, 1, -1),
        (7, -1),
        lambda x, a: jnp.einsum("bhk,hkr->br", x, a),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_derivative_is_jaxs_own(name):
    x, x_axes, factor, axes, out, plain = CASES[name]
    f = lambda x, factor: thin(x, x_axes, factor, axes, out)
    close = lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    jax.tree.map(close, f(x, factor), plain(x, factor))
    square = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args)))
    grad = lambda f: jax.grad(square(f), (0, 1))(x, factor)
    jax.tree.map(close, grad(f), grad(plain))
    along = (jnp.cos(x), jnp.cos(factor))
    jax.tree.map(close, jax.jvp(f, (x, factor), along), jax.jvp(plain, (x, factor), along))
    second = lambda f: jax.jvp(jax.grad(square(f), 1), (x, factor), along)  # forward over reverse
    jax.tree.map(close, second(f), second(plain))
    many = jnp.stack([factor, 2 * factor])
    for dims in ((None, 0), (0, None)):
        args = (x, many) if dims[1] == 0 else (jnp.stack([x, -x]), factor)
        each = lambda f, dims=dims: jax.vmap(jax.grad(square(f), 1), dims)
        jax.tree.map(close, each(f)(*args), each(plain)(*args))


def test_bf16_gradients_keep_their_dtypes():
    f = lambda x, a: thin(x, (7, 8, 0), a, (0, -1), (7, 8, -1), preferred_element_type=jnp.float32).sum()
    check_grads(f, (X, A), 1, atol=1e-2, rtol=1e-2)
    grads = jax.grad(f, (0, 1))(X.astype(jnp.bfloat16), A.astype(jnp.bfloat16))
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_no_activation_is_transposed():
    """Compiled for a CPU: JAX's own rules copy x or its cotangent to [in, tokens]; here only [r, tokens] is."""

    def loss(product):
        return lambda a, b: jnp.sum(jnp.tanh(product(product(jnp.sin(X), a), b)))

    def copies(product):
        text = jax.jit(jax.grad(loss(product), (0, 1))).lower(A, A.T).compile().as_text()
        shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose|fusion)\([^\n]*op_name", text)
        return [s for s in shapes if s.split(",")[0] == str(D) and np.prod([int(n) for n in s.split(",")]) == B * S * D]

    labels = lambda x, f: (x, (7, 8, 0), f, (0, 1), (7, 8, 1))
    assert copies(lambda x, f: x @ f), "JAX or XLA has learnt it: jlora.thin may go"
    assert not copies(lambda x, f: thin(*labels(x, f)))
