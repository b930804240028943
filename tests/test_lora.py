"""lorafy, combine and merge: scalings, inits, dropout, dtypes, exactness, and what a swap of tasks costs."""

from __future__ import annotations

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.leaves import LoraLeaf, MaterialisedWarning
from jlora.lora import Together, is_adapter, on_plain_base
from jlora.merging import MergedAsFloats
from jlora.methods import bitfit, dora
from jlora.methods.together import together

X = jax.random.normal(jax.random.key(9), (5, 12))


def weights(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (12, 20), dtype)},
        "down": {"kernel": jax.random.normal(keys[1], (20, 6), dtype)},
    }


def apply(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def moved(lora, seed=3):
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, new)


def test_scaling_is_alpha_over_r_and_over_its_root_with_rslora():
    params = weights()
    plain = jlora.lorafy(params, 4, alpha=16)[1]
    rs = jlora.lorafy(params, 4, alpha=16, rslora=True)[1]
    assert plain["up"]["kernel"].scaling == 4.0
    assert rs["up"]["kernel"].scaling == 8.0
    entry = moved(plain)["up"]["kernel"]
    want = params["up"]["kernel"] + 4.0 * np.asarray(entry.lora_a) @ np.asarray(entry.lora_b)
    got = jlora.merge(params, {"up": {"kernel": entry}, "down": {"kernel": None}})["up"]["kernel"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_kaiming_bound_and_gaussian_spread():
    params = {"w": jnp.zeros((4096, 8))}
    a = jlora.lorafy(params, 8, key=jax.random.key(1))[1]["w"].lora_a
    bound = 1 / math.sqrt(4096)  # kaiming_uniform with a = sqrt(5): sqrt(6 / ((1 + 5) fan_in))
    assert 0.95 * bound < float(jnp.abs(a).max()) <= bound
    # PEFT's gaussian has standard deviation 1 / r
    a = jlora.lorafy(params, 8, key=jax.random.key(1), init="gaussian")[1]["w"].lora_a
    assert abs(float(a.std()) * 8 - 1) < 0.02


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_from_the_weight_keep_the_function_and_change_the_base(init):
    params = weights()
    frozen, lora = jlora.lorafy(params, 4, alpha=8, init=init)
    assert float(jnp.abs(lora["up"]["kernel"].lora_b).max()) > 0
    assert float(jnp.abs(frozen["up"]["kernel"] - params["up"]["kernel"]).max()) > 0.01
    np.testing.assert_allclose(jlora.lift(apply)(jlora.combine(frozen, lora), X), apply(params, X), atol=2e-5)
    if init == "pissa":  # the principal part: what is left has lost the largest singular values
        left = np.linalg.svd(np.asarray(frozen["up"]["kernel"]), compute_uv=False)
        whole = np.linalg.svd(np.asarray(params["up"]["kernel"]), compute_uv=False)
        np.testing.assert_allclose(left[: 12 - 4], whole[4:], rtol=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("method", ["lora", "two", "dora", "codes"])
def test_a_merge_rounds_once(method, kind):
    base = {"kernel": (jax.random.normal(jax.random.key(0), (64, 48)) / 4).astype(kind)}
    lorafy = lambda seed: lambda params: jlora.lorafy(params, 4, key=jax.random.key(seed))
    if method == "codes":
        if kind != "bfloat16":
            pytest.skip("codes of float8 are not made")
        base = jlora.quantise(base, "int8", layouts={"kernel": "io"})
    make = {"dora": lambda params: dora.make(params, 4), "two": lambda params: together(params, lorafy(0), lorafy(1))}
    frozen, lora = make.get(method, lorafy(0))(base)
    lora = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergedAsFloats)
        merged = jlora.merge(frozen, lora)["kernel"]
        held = frozen["kernel"]
        wide = dataclasses.replace(held, kind=jnp.float32).materialise() if method == "codes" else held
        wide = wide.astype(jnp.float32)
        want = jlora.merge({"kernel": wide}, lora)["kernel"].astype(kind)
    assert merged.dtype == kind and bool((merged == want).all())


def test_bf16_base_keeps_fp32_factors_and_merges_in_its_own_precision():
    params = weights(jnp.bfloat16)
    frozen, lora = jlora.lorafy(params, 4, alpha=8)
    lora = moved(lora)
    assert lora["up"]["kernel"].lora_a.dtype == jnp.float32
    out = jlora.lift(apply)(jlora.combine(frozen, lora), X.astype(jnp.bfloat16))
    merged = jlora.merge(frozen, lora)
    assert out.dtype == jnp.bfloat16 and merged["up"]["kernel"].dtype == jnp.bfloat16
    exact = apply(jax.tree.map(lambda w: w.astype(jnp.float32), merged), X.astype(jnp.bfloat16).astype(jnp.float32))
    scale = float(jnp.abs(exact).max())
    assert float(jnp.abs(out.astype(jnp.float32) - exact).max()) < 0.02 * scale
    # the sum is taken in float32 and rounded once
    entry = lora["up"]["kernel"]
    want = params["up"]["kernel"].astype(jnp.float32) + 2.0 * jnp.matmul(
        entry.lora_a, entry.lora_b, precision="highest"
    )
    assert bool((merged["up"]["kernel"] == want.astype(jnp.bfloat16)).all())


def test_merging_leaves_the_base_exactly_as_it_was():
    params = weights()
    before = jax.tree.map(np.array, params)
    frozen, lora = jlora.lorafy(params, 4)
    assert all(a is b for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(params), strict=True))
    merged = jlora.merge(frozen, moved(lora))
    assert not np.array_equal(merged["up"]["kernel"], before["up"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_dropout_drops_the_adapters_input_only_and_keeps_its_mean():
    params = {"w": jnp.zeros((12, 6))}
    frozen, lora = jlora.lorafy(params, 4, alpha=4)
    lora = moved(lora)
    f = jlora.lift(lambda p, x: x @ p["w"])
    want = f(jlora.combine(frozen, lora), X)
    draw = jax.jit(jax.vmap(lambda key: f(jlora.combine(frozen, lora, dropout=0.25, key=key), X)))
    many = draw(jax.random.split(jax.random.key(0), 4000))
    assert float(jnp.abs(many.mean(0) - want).max()) < 0.05 * float(jnp.abs(want).max()) + 0.05
    assert float(many.std(0).min()) > 0
    # a zero adapter under dropout changes nothing: the frozen product is not dropped
    frozen, zero = jlora.lorafy(weights(), 4)
    out = jlora.lift(apply)(jlora.combine(frozen, zero, dropout=0.5, key=jax.random.key(1)), X)
    np.testing.assert_array_equal(out, apply(frozen, X))


@pytest.mark.parametrize("pick", [lambda w: w[1], lambda w: jnp.take(w, 1, axis=0), lambda w: w[jnp.array([2, 1])][1]])
def test_a_matrix_picked_from_a_stack_drops_too(pick):
    params = {"w": jnp.zeros((3, 8, 2))}
    lora = {"w": jlora.LoraFactors(jnp.ones((3, 8, 1)), jnp.ones((3, 1, 2)), 1.0, "sio")}
    f = jlora.lift(lambda p, x: x @ pick(p["w"]), strict=True)
    y = f(jlora.combine(params, lora, dropout=0.5, key=jax.random.key(0)), jnp.ones((200, 8)))
    assert set(np.unique(y)) <= set(range(0, 17, 2)) and len(np.unique(y)) > 3


def test_each_layer_of_a_scanned_stack_drops_by_itself():
    params = {"w": jnp.zeros((3, 8, 2))}
    lora = {"w": jlora.LoraFactors(jnp.ones((3, 8, 1)), jnp.ones((3, 1, 2)), 1.0, "sio")}
    f = lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1][:, :, 0]  # [3, 200]
    y = jlora.lift(f)(jlora.combine(params, lora, dropout=0.5, key=jax.random.key(0)), jnp.ones((200, 8)))
    assert set(np.unique(y)) <= set(range(0, 17, 2))  # of eight ones those that are left, doubled
    for n, other in ((0, 1), (1, 2), (0, 2)):
        assert 0.1 < float(jnp.mean(y[n] == y[other])) < 0.35  # as of independent draws: 0.196
    assert set(np.unique(jlora.lift(f)(jlora.combine(params, lora), jnp.ones((2, 8))))) == {8.0}


def test_every_leaf_is_drawn_by_itself():
    drawn_for = lambda names: jlora.lorafy({n: jnp.zeros((4, 4)) for n in names}, 2, targets=lambda path, leaf: True)[1]
    lora, more = drawn_for("abcdef"), drawn_for("abcdefg")
    drawn = {np.asarray(entry.lora_a).tobytes() for entry in lora.values()}
    assert len(drawn) == 6
    np.testing.assert_array_equal(more["a"].lora_a, lora["a"].lora_a)  # another target changes no other leaf


def test_the_least_and_the_largest_rank():
    params = weights()
    _, lora = jlora.lorafy(params, 1)
    assert {entry["kernel"].lora_a.shape[-1] for entry in lora.values()} == {1}
    frozen, lora = jlora.lorafy(params, config=jlora.LoraConfig(r=6, init_lora_weights="pissa", target_modules="down"))
    assert float(jnp.abs(frozen["down"]["kernel"]).max()) < 1e-5  # the whole weight is in the factors
    np.testing.assert_allclose(jlora.merge(frozen, lora)["down"]["kernel"], params["down"]["kernel"], atol=1e-5)
    with pytest.raises(ValueError, match="needs at most 6"):
        jlora.lorafy(params, config=jlora.LoraConfig(r=7, init_lora_weights="pissa", target_modules="down"))


def test_a_quantised_weight_takes_an_init_that_leaves_it_as_it_is():
    params = jlora.quantise(weights(), "int8")
    frozen, _ = jlora.lorafy(params, 2)
    assert frozen["up"]["kernel"] is params["up"]["kernel"]
    with pytest.raises(ValueError, match="changes the base"):
        jlora.lorafy(params, config=jlora.LoraConfig(r=2, init_lora_weights="pissa"))
    frozen, lora = jlora.lorafy(params, 2)
    with pytest.warns(MergedAsFloats, match="2 weights of the base"):
        assert jlora.merge(frozen, lora)["up"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_the_base_on_the_base_as_it_was(init):
    params = {"w": jax.random.normal(jax.random.key(1), (3, 8, 5))}
    config = jlora.LoraConfig(r=2, init_lora_weights=init)
    frozen, start = jlora.lorafy(params, config=config, layouts={"w": "sio"})
    lora = moved(start)
    want = jlora.merge(frozen, lora)["w"]
    np.testing.assert_allclose(jlora.merge(params, on_plain_base(lora, start))["w"], want, atol=1e-5)


def test_a_leaf_is_its_arrays_and_begins_with_the_plain_sum():
    w, a, b = jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3))
    leaf = LoraLeaf(w, a, b)
    assert (leaf.scaling, leaf.dropout, leaf.key_axes, leaf.path) == (1.0, 0.0, (), "")
    np.testing.assert_array_equal(leaf.materialise(), w + a @ b)
    stack = {"w": jnp.ones((3, 8, 5))}
    config = jlora.LoraConfig(r=2, lora_alpha=8)
    frozen, lora = jlora.lorafy(stack, config=config, layouts={"w": "sio"})
    whole = jlora.combine(frozen, lora, dropout=0.5, key=jax.random.key(0))["w"]
    assert whole.key_axes == (0,) and whole.scaling == 4.0
    assert [x.shape for x in jax.tree.leaves(whole)] == [(3, 8, 5), (3, 8, 2), (3, 2, 5), (3,)]


def test_adapters_together_drop_each_by_itself():
    params = {"w": jnp.zeros((8, 2))}
    one = {"w": jlora.LoraFactors(jnp.ones((8, 1)), jnp.ones((1, 2)), 1.0)}
    f = jlora.lift(lambda p: jnp.ones((200, 8)) @ p["w"])
    both = Together((one, one))
    assert set(np.unique(f(jlora.combine(params, both)))) == {16.0}
    y = f(jlora.combine(params, both, dropout=0.5, key=jax.random.key(0)))[:, 0]
    assert len(set(np.unique(y % 4))) == 2  # of one mask for both every sum would be a multiple of four


def test_biases_are_trained_where_the_config_says_so():
    params = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    for bias, trained in (("none", {"kernel"}), ("all", {"kernel", "bias"})):
        _, lora = jlora.lorafy(params, config=jlora.LoraConfig(r=1, bias=bias))
        assert {name for name, entry in lora["layer"].items() if entry is not None} == trained
    haiku = {
        "linear": {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)},
        "norm": {"scale": jnp.ones(3), "offset": jnp.zeros(3)},
    }
    _, lora = jlora.lorafy(haiku, config=jlora.LoraConfig(r=1, bias="all"))
    _, alone = bitfit.make(haiku)
    assert set(jlora.tree.paths(alone)) == {"linear/b", "norm/offset"}
    assert set(jlora.tree.paths(lora, is_adapter)) == {"linear/w", "linear/b", "norm/offset"}
    assert set(jlora.tree.paths(bitfit.norms(haiku)[1])) == {"norm/scale", "norm/offset"}
    with pytest.raises(ValueError, match="'some' is not known"):
        jlora.lorafy(params, config=jlora.LoraConfig(r=1, bias="some"))


def test_dropout_needs_a_key_and_a_probability():
    frozen, lora = jlora.lorafy(weights(), 4)
    with pytest.raises(ValueError, match="needs key="):
        jlora.combine(frozen, lora, dropout=0.1)
    with pytest.raises(ValueError, match="below 1"):
        jlora.combine(frozen, lora, dropout=1.0, key=jax.random.key(0))
    key = jax.random.key(0)
    one, other = (jlora.combine(frozen, lora, dropout=p, key=key) for p in (np.float32(0.25), 0.25))
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.parametrize("shape, layout", [((8, 3), "io"), ((2, 8, 3), "sio")])
def test_an_old_key_is_the_new_one(shape, layout):
    frozen, lora = jlora.lorafy({"w": jnp.ones(shape)}, 2, layouts={"w": layout}, key=jax.random.PRNGKey(3))
    jax.tree.map(
        np.testing.assert_array_equal,
        lora,
        jlora.lorafy({"w": jnp.ones(shape)}, 2, layouts={"w": layout}, key=jax.random.key(3))[1],
    )
    f = jax.jit(jlora.lift(lambda p, x: jnp.matmul(x, p["w"]), strict=True))
    with_key = lambda key: f(jlora.combine(frozen, moved(lora), dropout=0.5, key=key), jnp.ones((*shape[:-2], 5, 8)))
    np.testing.assert_array_equal(with_key(jax.random.PRNGKey(1)), with_key(jax.random.key(1)))
    assert float(jnp.abs(with_key(jax.random.key(1)) - with_key(jax.random.PRNGKey(2))).max()) > 0


def test_swapping_tasks_compiles_nothing():
    frozen, lora = jlora.lorafy(weights(), 4)
    traces = []

    @jax.jit
    def run(frozen, lora, x):
        traces.append(1)
        return jlora.lift(apply)(jlora.combine(frozen, lora), x)

    outs = [run(frozen, moved(lora, seed), X) for seed in range(4)]
    assert len(traces) == 1
    assert len({float(out[0, 0]) for out in outs}) == 4


def test_materialising_is_said_once_and_forbidden_by_strict():
    params = {"w": jnp.linspace(0.1, 1, 36).reshape(6, 6)}
    frozen, lora = jlora.lorafy(params, 2, targets="w")
    lora = moved(lora)
    f = lambda p: jnp.linalg.inv(p["w"] + jnp.eye(6)).sum() + jnp.sin(p["w"]).sum()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        out = jlora.lift(f)(jlora.combine(frozen, lora))
        jlora.lift(f)(jlora.combine(frozen, lora))
    texts = [str(w.message) for w in said if issubclass(w.category, MaterialisedWarning)]
    assert len(texts) == len(set(texts)) == 2
    assert all("weight w [6, 6]" in text for text in texts)
    assert any("sin" in text for text in texts)
    np.testing.assert_allclose(out, f(jlora.merge(frozen, lora)), rtol=1e-4)
    with pytest.raises(ValueError, match=r"weight w \[6, 6\] .* sin|strict=True"):
        jlora.lift(f, strict=True)(jlora.combine(frozen, lora))


@pytest.mark.filterwarnings("ignore::jlora.leaves.MaterialisedWarning")
def test_a_product_of_a_weight_with_itself():
    params = {"w": jax.random.normal(jax.random.key(2), (6, 6))}
    frozen, lora = jlora.lorafy(params, 2, targets="w")
    lora = moved(lora)
    f = lambda p: p["w"] @ p["w"]
    merged = jlora.merge(frozen, lora)
    np.testing.assert_allclose(jlora.lift(f)(jlora.combine(frozen, lora)), f(merged), rtol=1e-4, atol=1e-4)


def test_a_weight_read_in_a_while_loop_stays_factored():
    params = {"w": 0.1 * jax.random.normal(jax.random.key(2), (12, 12))}
    frozen, lora = jlora.lorafy(params, 2, targets="w")
    lora = moved(lora)
    f = lambda p, x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1]
    got = jax.jit(jlora.lift(f, strict=True))(jlora.combine(frozen, lora), X)
    np.testing.assert_allclose(got, f(jlora.merge(frozen, lora), X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"targets": "downs"}, "'downs' matches no leaf; near: down"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"init": "xavier"}, "'xavier' is not known"),
        ({"init": "pissa", "alpha": 0}, "alpha is 0 for down/kernel: init 'pissa' divides by alpha / rank"),
        ({"init": "olora", "alpha": -4}, "alpha is -4 for down/kernel: init 'olora' divides by alpha / rank"),
        ({"targets": lambda path, leaf: False}, "predicate is true for none of the 2 leaves"),
    ],
)
def test_bad_arguments_say_what_would_do(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        jlora.lorafy(weights(), **{"rank": 2, **arguments})


def test_a_predicate_is_asked_of_floats_alone():
    params = {"ids": jnp.arange(12).reshape(3, 4), "w": jnp.ones((3, 4))}
    lora = jlora.lorafy(params, 2, targets=lambda path, leaf: True)[1]
    assert lora["ids"] is None and lora["w"] is not None


def test_three_axes_need_layouts_and_the_error_says_both_ways():
    params = {"experts": {"kernel": jnp.ones((3, 4, 5))}}
    with pytest.raises(ValueError, match=r"experts/kernel \[3, 4, 5\].*layouts=.*jlora\.layouts"):
        jlora.lorafy(params, 2, targets="experts")
    lora = jlora.lorafy(params, 2, layouts={"experts": "sio"})[1]
    assert lora["experts"]["kernel"].lora_a.shape == (3, 4, 2)


def test_rank_and_alpha_by_pattern():
    lora = jlora.lorafy(weights(), 2, alpha=4, rank_pattern={"down": 5}, alpha_pattern={"^up": 1})[1]
    assert lora["down"]["kernel"].lora_a.shape == (20, 5) and lora["down"]["kernel"].scaling == 0.8
    assert lora["up"]["kernel"].lora_a.shape == (12, 2) and lora["up"]["kernel"].scaling == 0.5
