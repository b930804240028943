"""Which leaves of one tree train, and what moves them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora


def test_names_may_come_from_a_generator():
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3), "c": jnp.zeros(3)}
    tree = jlora.combine(*jlora.lorafy(params, 1))
    names = lambda: (name for name in ("b",))
    labels = jlora.trainable_labels(tree, also=names())
    assert (labels["b"], labels["c"]) == ("whole", "frozen")
    tx = jlora.only_trainable(optax.sgd(1.0), also=names())
    state, gradients = tx.init(tree), jax.tree.map(jnp.ones_like, tree)
    for _ in range(2):
        updates, state = tx.update(gradients, state, tree)
        assert updates["b"].tolist() == [-1.0] * 3 and updates["c"].tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="'z' matches no leaf"):
        jlora.only_trainable(optax.sgd(1.0), also=iter("z")).init(tree)
