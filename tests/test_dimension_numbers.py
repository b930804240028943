"""hypothesis draws dot_general's dimension numbers; every draw is held against the dense product and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jlora
from jlora.lora import LoraFactors

SIZES = st.integers(1, 4)


@st.composite
def products(draw):
    """(layout, weight's shape, x's shape, dimension numbers with the weight on the left or right)."""
    letters = draw(st.lists(st.sampled_from("sio"), min_size=2, max_size=4).filter(lambda x: {"i", "o"} <= set(x)))
    shape = [draw(SIZES) for _ in letters]
    # what the product contracts is i in most draws, o in others (x @ W.T), and a stack may be batched or free
    contracted = draw(st.sampled_from(["i", "o", "io"]))
    contract = [n for n, letter in enumerate(letters) if letter in contracted]
    stacks = [n for n, letter in enumerate(letters) if letter == "s"]
    batch = [n for n in stacks if draw(st.booleans())]
    contract, batch = draw(st.permutations(contract)), draw(st.permutations(batch))
    free = [draw(SIZES) for _ in range(draw(st.integers(0, 2)))]
    roles = draw(st.permutations([("w", n) for n in (*contract, *batch)] + [("x", n) for n in range(len(free))]))
    x_shape = [shape[n] if kind == "w" else free[n] for kind, n in roles]
    place = {n: at for at, (kind, n) in enumerate(roles) if kind == "w"}
    weight = (tuple(contract), tuple(batch))
    other = (tuple(place[n] for n in contract), tuple(place[n] for n in batch))
    left = draw(st.booleans())
    pair = (weight, other) if left else (other, weight)
    numbers = ((pair[0][0], pair[1][0]), (pair[0][1], pair[1][1]))
    return "".join(letters), tuple(shape), tuple(x_shape), numbers, left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(products(), st.integers(0, 2**16))
def test_every_dot_general_equals_the_dense_one(product, seed):
    layout, shape, x_shape, numbers, left = product
    keys = jax.random.split(jax.random.key(seed), 4)
    w = jax.random.normal(keys[0], shape)
    x = jax.random.normal(keys[1], x_shape)
    lora = jlora.lorafy({"w": w}, 2, alpha=3, layouts={"w": layout})[1]
    entry: LoraFactors = lora["w"]
    b = jax.random.normal(keys[2], entry.lora_b.shape)
    lora = {"w": LoraFactors(entry.lora_a, b, entry.scaling, entry.layout)}

    def f(params, x):
        operands = (params["w"], x) if left else (x, params["w"])
        return lax.dot_general(*operands, numbers, precision="highest")

    lifted = jlora.lift(f, strict=True)
    got = lifted(jlora.combine({"w": w}, lora), x)
    want = f(jlora.merge({"w": w}, lora), x)
    scale = float(jnp.abs(want).max()) + 1e-3
    np.testing.assert_allclose(got, want, atol=1e-5 * scale + 1e-6)

    weigh = jax.random.normal(keys[3], want.shape)
    grads = jax.grad(lambda lora, x: (lifted(jlora.combine({"w": w}, lora), x) * weigh).sum(), argnums=(0, 1))
    dense = jax.grad(lambda lora, x: (f(jlora.merge({"w": w}, lora), x) * weigh).sum(), argnums=(0, 1))
    for g, d in zip(jax.tree.leaves(grads(lora, x)), jax.tree.leaves(dense(lora, x)), strict=True):
        np.testing.assert_allclose(g, d, atol=1e-4 * (float(jnp.abs(d).max()) + 1e-2))
