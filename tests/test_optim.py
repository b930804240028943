"""Which leaves of one tree train, and what moves them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora.methods.lora_plus import lora_plus


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


def test_integers_in_one_tree_stay_and_need_no_care():
    """The codes of a quantised base, whose gradients are float0."""
    params = {"up": jax.random.normal(jax.random.key(0), (8, 6)), "ids": jnp.arange(3, dtype=jnp.uint8)}
    for scheme in ("int8", "nf4"):
        base = jlora.quantise(params, scheme, layouts={"up": "io"})
        tree = jlora.combine(*jlora.lorafy(base, 2, targets="up"))
        loss = lambda tree: jnp.sum(jlora.lift(lambda p, x: x @ p["up"])(tree, jnp.ones((2, 8))))
        grads = jax.grad(loss, allow_int=True)(tree)
        for tx in (jlora.only_trainable(optax.adam(0.1)), lora_plus(optax.adam, 0.1)):
            for given in ((tree,), ()):  # optax lets the third argument be left out
                updates, _ = tx.update(grads, tx.init(tree), *given)
                after = optax.apply_updates(tree, updates)
                assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, tree)
                mask = jax.tree.leaves(jlora.trainable_mask(tree))
                for on, old, new in zip(mask, jax.tree.leaves(tree), jax.tree.leaves(after), strict=True):
                    assert on or jnp.array_equal(old, new)
                assert jnp.abs(after["up"].lora_b).min() > 0
