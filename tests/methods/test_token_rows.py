"""Trained rows of an embedding, with a tied head: nothing else moves, and the start is the base bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.methods import lora_plus, token_rows
from jlora.methods.together import together
from jlora.tree import size

TOKENS = jnp.array([[1, 4, 2, 4]])


def apply(params, tokens):
    return jnp.tanh(params["table"][tokens]) @ params["table"].T


def test_rows_are_replaced_in_lookup_and_tied_head():
    params = {"table": jax.random.normal(jax.random.key(0), (9, 5))}
    frozen, rows = token_rows.make(params, {"table": [4, 7]})
    assert size(rows) == 10
    f = jlora.lift(apply, strict=True)
    np.testing.assert_array_equal(f(jlora.combine(frozen, rows), TOKENS), apply(params, TOKENS))
    new = jax.tree.map(lambda x: x + 1.0, rows)
    dense = {"table": params["table"].at[jnp.array([4, 7])].add(1.0)}
    np.testing.assert_allclose(f(jlora.combine(frozen, new), TOKENS), apply(dense, TOKENS), atol=1e-5)
    np.testing.assert_allclose(jlora.merge(frozen, new)["table"], dense["table"], atol=1e-6)
    loss = lambda out: (out**2).sum()
    got = jax.grad(lambda r: loss(f(jlora.combine(frozen, r), TOKENS)))(new)["table"].rows
    want = jax.grad(lambda p: loss(apply(p, TOKENS)))(dense)["table"][jnp.array([4, 7])]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_in_one_tree_the_rows_alone_train():
    params = {"table": jax.random.normal(jax.random.key(0), (9, 5))}
    tree = jlora.combine(*token_rows.make(params, {"table": [4, 7]}))
    tx = jlora.only_trainable(optax.sgd(0.1))
    grads = jax.grad(lambda t: jnp.sum(jlora.lift(apply, strict=True)(t, TOKENS) ** 2))(tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)["table"].materialise()
    others = jnp.array([n for n in range(9) if n not in (4, 7)])
    np.testing.assert_array_equal(after[others], params["table"][others])
    assert jnp.abs(after - params["table"])[jnp.array([4, 7])].min() > 0
    assert sum(jax.tree.leaves(jlora.trainable_mask(tree))) == 1


def test_the_rows_are_no_b_to_lora_plus():
    """In one tree as in two: they have A's rate."""
    params = {"table": jnp.ones((9, 5)), "kernel": jnp.ones((5, 5))}
    frozen, trained = together(
        params, lambda p: token_rows.make(p, {"table": [4, 7]}), lambda p: jlora.lorafy(p, 2, targets="kernel")
    )
    assert sorted(jax.tree.leaves(lora_plus.labels(trained))) == ["a", "a", "b"]
    tree = jlora.combine(frozen, trained)
    labels = lora_plus.labels(tree)
    assert labels["table"].lora_b == "a" and labels["kernel"].lora_b == "b"
    assert jlora.trainable_labels(tree)["table"].lora_b == "rows"
    assert sorted(jax.tree.leaves(labels)) == ["a", "a", "b", "frozen", "frozen", "frozen"]


@pytest.mark.parametrize("ids", [{"tables": [1]}, {"table": [9]}, {"table": [1, 1]}, {"table": []}])
def test_wrong_rows_are_refused(ids):
    with pytest.raises(ValueError, match=r"no embedding|must differ and lie in"):
        token_rows.make({"table": jnp.zeros((9, 5))}, ids)
