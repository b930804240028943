"""The public functions on what they were not made for, and in any order of JAX's transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora

P = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
FROZEN, LORA = jlora.lorafy(P, 2)
OTHER = {**P, "up": {"kernel": jnp.ones((5, 6))}}
ONE = {"up": P["up"]}
X = jnp.ones((2, 4))


def apply(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


WRONG = {
    "a tree with less": (lambda: jlora.combine(ONE, LORA), "down/kernel is in the second only"),
    "a tree with more": (lambda: jlora.combine({**P, "more": 1.0}, LORA), "more is in the first only"),
    "a list": (lambda: jlora.combine([1, 2], LORA), "the trees differ"),
    "nothing": (lambda: jlora.merge(None, LORA), "the trees differ"),
    "the trees the other way": (lambda: jlora.combine(LORA, FROZEN), r"down/kernel: .* combine\(frozen, lora\)"),
    "another model": (lambda: jlora.combine(OTHER, LORA), r"up/kernel \[5, 6\]: factors \[4, 2\] and \[2, 6\]"),
    "a leaf of another shape": (lambda: jlora.combine(OTHER, P), r"up/kernel: \[5, 6\] in the first tree, \[4, 6\]"),
    "more axes": (
        lambda: jlora.merge({**P, "up": {"kernel": jnp.ones((3, 4, 6))}}, LORA),
        r"up/kernel \[3, 4, 6\]: factors",
    ),
    "integers": (lambda: jlora.lorafy({"w": jnp.ones((4, 6), jnp.int32)}, 2), "no linear weight"),
    "an empty tree": (lambda: jlora.lorafy({}, 2), "no linear weight"),
    "no tree": (lambda: jlora.lorafy("x", 2), "no linear weight"),
    "rank 0": (lambda: jlora.lorafy(P, 0), "r=0: the rank must be 1 or more"),
    "a rank of text": (lambda: jlora.lorafy(P, "8"), "r='8': the rank"),
    "a rank with a fraction": (lambda: jlora.lorafy(P, 2.5), "r=2.5: the rank"),
    "a rank of True": (lambda: jlora.lorafy(P, True), "r=True: the rank"),
    "rank 0 by pattern": (lambda: jlora.lorafy(P, 2, rank_pattern={"up": 0}), r"rank_pattern\['up'\]=0"),
    "alpha NaN": (lambda: jlora.lorafy(P, 2, alpha=float("nan")), "lora_alpha=nan"),
    "alpha by a list": (lambda: jlora.lorafy(P, 2, alpha_pattern=["up"]), "alpha_pattern="),
    "a key of a number": (lambda: jlora.lorafy(P, 2, key=0), r"key 0: a PRNG key .*jax.random.key\(0\)"),
    "a rank of no weight": (
        lambda: jlora.lorafy(P, 2, rank_pattern={"up": 3, "dwon": 4}),
        "rank_pattern: 'dwon' matches no leaf; near: down",
    ),
    "an alpha of no weight": (
        lambda: jlora.lorafy(P, config=jlora.LoraConfig(alpha_pattern={"ups": 4})),
        "alpha_pattern: 'ups' matches no leaf; near: up",
    ),
    "nothing to train whole": (lambda: jlora.lorafy(P, 2, train="upp"), "^train: 'upp' matches no leaf; near: up"),
    "no module to save": (
        lambda: jlora.lorafy(P, config=jlora.LoraConfig(modules_to_save=["upp"])),
        "^modules_to_save: 'upp' matches no leaf; near: up",
    ),
    "a key of a number for dropout": (
        lambda: jlora.combine(FROZEN, LORA, dropout=0.5, key=0),
        r"key 0: a PRNG key .*jax.random.key\(0\)",
    ),
    "no targets": (lambda: jlora.lorafy(P, 2, targets=[]), "nothing is left"),
    "targets of numbers": (lambda: jlora.lorafy(P, 2, targets=[3]), "target_modules="),
    "no regex": (lambda: jlora.lorafy(P, 2, targets="("), r"'\(' is no regex"),
    "layouts in a list": (lambda: jlora.lorafy(P, 2, layouts=["up"]), "layouts is a list"),
    "unknown letters": (lambda: jlora.lorafy(P, 2, layouts={"up": "xy"}), "layouts"),
    "factors of integers": (lambda: jlora.lorafy(P, 2, dtype=jnp.int32), "factors are floats"),
    "dropout of text": (lambda: jlora.combine(FROZEN, LORA, dropout="a"), "dropout 'a'"),
    "dropout 1": (lambda: jlora.combine(FROZEN, LORA, dropout=1), "dropout 1"),
    "labels of nothing": (lambda: jlora.trainable_labels(jlora.combine(P, LORA), also="z"), "'z' matches no leaf"),
    "a bias of no kind": (lambda: jlora.LoraConfig(bias=3), "bias=3"),
    "an unknown init": (lambda: jlora.lorafy(P, 2, init="xavier"), "'xavier' is not known"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence_that_names_the_place(name):
    call, says = WRONG[name]
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_donated_tree_is_gone_and_says_so():
    spent = jax.tree.map(jnp.copy, LORA)
    jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(spent)
    with pytest.raises(RuntimeError, match="deleted"):
        jlora.merge(FROZEN, spent)
    jlora.merge(FROZEN, LORA)  # the base and other adapters are not


def moved(lora):
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(treedef, [0.3 * jax.random.normal(k, x.shape) for k, x in pairs])


WRAPS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 0.5 * x]))[1] * 2,
    "grad": lambda f: lambda x: jax.grad(lambda y: jnp.sum(jnp.sin(f(y))))(x),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > -1e9, f, lambda y: y, x),
    "map": lambda f: lambda x: jax.lax.map(f, x[None])[0],
}


@pytest.mark.filterwarnings("ignore::jlora.leaves.MaterialisedWarning")  # grad in cond hands the weight on
@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(WRAPS)), min_size=1, max_size=3), st.booleans())
def test_transformations_nest_in_any_order(order, outside):
    """Inside the lifted function or around it, the result is the merged weights'."""
    lora = moved(LORA)

    def wrapped(f):
        for name in order:
            f = WRAPS[name](f)
        return f

    params = jlora.combine(FROZEN, lora)
    if outside:
        got = wrapped(lambda x: jlora.lift(apply)(params, x))(X)
    else:
        got = jlora.lift(lambda p, x: wrapped(lambda y: apply(p, y))(x))(params, X)
    merged = jlora.merge(FROZEN, lora)
    want = wrapped(lambda x: apply(merged, x))(X)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


def test_no_tracer_is_left_behind():
    with jax.checking_leaks():
        jax.jit(lambda lora: jlora.lift(apply)(jlora.combine(FROZEN, lora), X).sum())(LORA)
        jax.grad(lambda lora: jlora.lift(apply)(jlora.combine(FROZEN, lora), X).sum())(LORA)


def test_a_rank_past_both_sides_is_the_same_kind_of_sum():
    frozen, lora = jlora.lorafy(P, 50, alpha=3)
    lora = moved(lora)
    assert lora["up"]["kernel"].lora_a.shape == (4, 50)
    got = jlora.lift(apply)(jlora.combine(frozen, lora), X)
    np.testing.assert_allclose(got, apply(jlora.merge(frozen, lora), X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="init 'pissa' needs at most 4"):
        jlora.lorafy(P, 50, init="pissa")


def test_alpha_0_is_the_base_and_has_no_gradient():
    frozen, lora = jlora.lorafy(P, 2, alpha=0)
    lora = moved(lora)
    loss = lambda lora: jlora.lift(apply)(jlora.combine(frozen, lora), X).sum()
    np.testing.assert_array_equal(jlora.lift(apply)(jlora.combine(frozen, lora), X), apply(P, X))
    assert all(not x.any() for x in jax.tree.leaves(jax.grad(loss)(lora)))
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(frozen, lora), P)


def test_float16_overflow_is_infinity_and_not_a_wrong_number():
    base = {"w": jnp.full((4, 4), 300.0, jnp.float16)}
    frozen, lora = jlora.lorafy(base, 2, alpha=2, targets="w")
    lora = jax.tree.map(lambda x: jnp.full(x.shape, 300.0), lora)
    merged = jlora.merge(frozen, lora)["w"]
    assert merged.dtype == jnp.float16 and bool(jnp.isinf(merged).all())
    assert bool(jnp.isfinite(jlora.merge(jax.tree.map(lambda w: w.astype(jnp.float32), frozen), lora)["w"]).all())
