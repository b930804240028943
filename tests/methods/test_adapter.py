"""Adapter layers against their formulas, what they refuse, and how many numbers train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import KEY, TOKENS, encoder, jitter, llama

import jlora
from jlora.methods import adapter, bitfit, full, ia3, intrinsic
from jlora.methods.together import together
from jlora.tree import size

W = jax.random.normal(KEY, (6, 5))
X = jax.random.normal(jax.random.key(9), (4, 6))
PARAMS = {"fc2": {"kernel": W, "bias": jnp.arange(5.0)}}


def dense(p, x):
    return x @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def norm(h, scale, bias):
    h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * scale + bias


@pytest.mark.parametrize("kind, act", [("houlsby", jax.nn.gelu), ("lin", jax.nn.relu), ("parallel", jax.nn.relu)])
def test_formula(kind, act):
    frozen, trained = adapter.make(PARAMS, 3, kind=kind, points="fc2", scaling=0.5, key=KEY)
    trained = jitter(trained)
    entry = trained["fc2"]["kernel"] if kind == "parallel" else trained["fc2"]
    p = entry.arrays
    y = dense(PARAMS, X)
    h = X if kind == "parallel" else y
    if kind == "lin":
        h = norm(h, p["norm_scale"], p["norm_bias"])
    want = y + 0.5 * (act(h @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"])
    got = jlora.lift(dense, strict=True)(jlora.combine(frozen, trained), X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    kernel_t = lambda params, x: x @ params["fc2"]["kernel"].T
    with pytest.raises(ValueError, match=r"fc2/kernel .* has an adapter layer"):
        jlora.lift(kernel_t)(jlora.combine(frozen, trained), X[:, :5])


def test_scanned_equals_loop_and_drop():
    (loop, one), (scan, many) = encoder(False), encoder(True)
    stacked = {path: leaf for path, leaf in jlora.tree.paths(many).items() if "layers/" in path}
    assert len(stacked) * 3 + 3 == len(jlora.tree.paths(one))
    many = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: (
            jnp.stack(
                [jlora.tree.paths(one)[jlora.tree.path_of(keys).replace("layers/", f"layers_{n}/")] for n in (0, 1, 2)]
            )
            if "layers" in jlora.tree.path_of(keys)
            else jlora.tree.paths(one)[jlora.tree.path_of(keys)]
        ),
        many,
    )
    frozen, trained = adapter.make(many, 3, drop=2, key=KEY)
    trained = jitter(trained)
    frozen_one, trained_one = adapter.make(one, 3, drop=2, key=KEY)
    assert size(trained) == size(trained_one) == 2 * (2 * 8 * 3 + 3 + 8)
    assert jlora.tree.paths(trained_one, lambda x: x is None)["layers_1/output/dense/kernel"] is None
    rows = iter(jax.tree.leaves(trained))
    trained_one = jax.tree.map(lambda x: next(rows)[0], trained_one)
    got = jlora.lift(scan, strict=True)(jlora.combine(frozen, trained), TOKENS)
    want = jlora.lift(loop, strict=True)(jlora.combine(frozen_one, trained_one), TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_drop_reads_the_numbers_of_blocks_and_says_where_there_are_none():
    blocks = {f"Block_{n}": {"Dense_0": {"kernel": W}} for n in range(3)}
    _, trained = adapter.make(blocks, 2, kind="parallel", points="Dense_0", drop=2)
    assert [x is None for x in (trained[f"Block_{n}"]["Dense_0"]["kernel"] for n in range(3))] == [True, True, False]
    stack = {"layers": {"Dense_0": {"kernel": jnp.ones((3, 6, 5))}}}
    _, trained = adapter.make(stack, 2, kind="parallel", points="Dense_0", drop=1)
    assert trained["layers"]["Dense_0"]["kernel"].arrays["up"].shape == (2, 2, 5)
    with pytest.raises(ValueError, match="drop=1: no layer number in fc2/kernel"):
        adapter.make(PARAMS, 2, points="fc2", drop=1)


def test_a_layer_of_its_own_is_no_stack():
    heads = {"layers": {"0": {"fc2": {"kernel": jnp.ones((6, 2, 5))}}}}
    with pytest.raises(ValueError, match=r"the axes of layers/0/fc2/kernel \[6, 2, 5\] cannot be told"):
        adapter.make(heads, 2, kind="parallel", points="fc2")


def test_refusals():
    _, params = llama()
    for options, text in (
        ({"kind": "x"}, "'x' is not known: houlsby"),
        ({"activation": "x"}, "activation 'x'"),
        ({"drop": 3}, "drop=3"),
        ({"points": "nowhere"}, "'nowhere' matches no"),
    ):
        with pytest.raises(ValueError, match=text):
            adapter.make(params, 2, **options)
    with pytest.raises(ValueError, match="width 0"):
        adapter.make(params, 0)
    frozen, trained = adapter.make(PARAMS, 3, points="fc2")
    with pytest.raises(ValueError, match=r"fc2/kernel .* cannot be merged"):
        jlora.merge(frozen, trained)
    frozen, both = together(PARAMS, lambda p: adapter.make(p, 3, points="fc2"), bitfit.make)
    with pytest.raises(ValueError, match="fc2/bias trains as well"):
        jlora.combine(frozen, both)


FULL = lambda p: full.make(p, train="kernel")


@pytest.mark.parametrize(
    ("makes", "said"),
    [
        (
            (lambda p: ia3.make(p, targets="fc2", feedforward=()), bitfit.make),
            "fc2/bias trains as well: make the method that",
        ),
        ((lambda p: intrinsic.make(p, 40), bitfit.make), "fc2/bias trains as well"),
        (
            (lambda p: jlora.lorafy(p, 2), FULL),
            "fc2/kernel trains whole, and has LoraFactors as well: leave it",
        ),
        ((lambda p: adapter.make(p, 3, points="fc2"), FULL), "fc2/kernel trains as well"),
    ],
)
def test_methods_that_do_not_go_together_say_so(makes, said):
    with pytest.raises(ValueError, match=said):
        jlora.combine(*together(PARAMS, *makes))
    if makes[1] is bitfit.make:
        jlora.combine(*together(PARAMS, *reversed(makes)))  # as it says


def test_mask_of_a_combined_tree_leaves_the_bias_out():
    frozen, trained = adapter.make(PARAMS, 3, points="fc2")
    mask = jlora.trainable_mask(jlora.combine(frozen, trained))
    assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(trained)) == 4


def test_the_top_rows_of_a_stack_come_before_what_adapts_it():
    params = {"layers": {"kernel": jnp.ones((3, 4, 4))}}
    makes = [lambda p: full.top(p, 1), lambda p: jlora.lorafy(p, 2, layouts={"kernel": "sio"})]
    jlora.combine(*together(params, *makes))
    with pytest.raises(ValueError, match="layers/kernel: its last rows train whole: make `top` first, the LoraLeaf"):
        jlora.combine(*together(params, *reversed(makes)))
