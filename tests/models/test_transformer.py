"""Somebody else's model: einsum weights of three axes, a tied table, two attentions. It learns a task by LoRA alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora.models.transformer import Transformer
from jlora.tree import paths

MODEL = Transformer(12, d=32, heads=4, hidden=48)


def batch(key, rows=64, length=5):
    """Write the source backwards; 1 begins the target."""
    source = jax.random.randint(key, (rows, length), 2, 12)
    answer = source[:, ::-1]
    return source, jnp.concatenate([jnp.ones((rows, 1), source.dtype), answer[:, :-1]], axis=1), answer


def setup():
    source, target, _ = batch(jax.random.key(0))
    params = MODEL.init(jax.random.key(1), source, target)["params"]
    apply = lambda params, *x: MODEL.apply({"params": params}, *x)
    return apply, params, jlora.layouts(apply, params, source, target), (source, target)


def test_its_weights_are_known_for_what_they_are():
    _, _, found, _ = setup()
    assert found["EncoderLayer_0/Attention_0/query"].letters == "ioo"
    assert found["DecoderLayer_1/cross/out"].letters == "iio"
    assert found["table"].kind == "embedding" and found["table"].tied
    assert found["EncoderLayer_0/LayerNorm_0/scale"].kind == "scale"


def test_adapters_on_every_weight_equal_the_merged_model():
    apply, params, found, inputs = setup()
    frozen, lora = jlora.lorafy(params, 3, targets=lambda path, leaf: True, layouts=found)
    assert {"table", "DecoderLayer_0/own/value"} <= {p.rsplit("/lora", 1)[0] for p in paths(lora)}
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    lora = jax.tree.unflatten(treedef, [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    got = jlora.lift(apply, strict=True)(jlora.combine(frozen, lora), *inputs)
    want = apply(jlora.merge(frozen, lora), *inputs)
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))


def test_it_learns_a_task_by_lora_alone():
    apply, params, found, _ = setup()
    frozen, lora = jlora.lorafy(params, 8, alpha=16, layouts=found)
    lifted, tx = jlora.lift(apply, strict=True), optax.adam(1e-2)

    def loss(lora, key):
        source, target, answer = batch(key)
        logits = lifted(jlora.combine(frozen, lora), source, target)
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()

    @jax.jit
    def step(lora, state, key):
        value, grads = jax.value_and_grad(loss)(lora, key)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    state, before = tx.init(lora), float(loss(lora, jax.random.key(7)))
    for n in range(250):
        lora, state, _ = step(lora, state, jax.random.key(100 + n))
    assert float(loss(lora, jax.random.key(7))) < 0.5 * before
