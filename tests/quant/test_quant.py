"""Quantised leaves: the function of the weights they stand for, in every layout; nothing kept for the backward pass."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.merging import MergedAsFloats
from jlora.methods import full
from jlora.quant import NF4, Int4, merge_quantised
from jlora.tree import nbytes

KEY = jax.random.key(0)


def draw(*shape, n=0):
    return jax.random.normal(jax.random.fold_in(KEY, n), shape)


def heads(p, x):
    """DenseGeneral: [d, h, k] reshaped for the product, and back by [h, k, d]."""
    y = jnp.einsum("bd,dhk->bhk", x, p["w"])
    return jnp.tanh(y).reshape(x.shape[0], -1) @ p["v"].reshape(-1, x.shape[1])


def over_layers(axis):
    def f(p, x):
        step = lambda c, w: (jnp.tanh(c @ w), None)
        return jax.lax.scan(step, x, jnp.moveaxis(p["w"], axis, 0))[0]

    return f


def by_index(p, x):
    def step(n, c):
        return jnp.tanh(c @ jax.lax.dynamic_index_in_dim(p["w"], n, keepdims=False))

    return jax.lax.fori_loop(0, 3, step, x) + x @ p["w"][1]


CASES = {
    "torch's way round": (lambda p, x: x @ p["w"].T, {"w": (6, 8)}, {"w": "oi"}),
    "halves of one matrix": (lambda p, x: sum(jnp.split(x @ p["w"][:, 2:], 2, 1)), {"w": (8, 10)}, {"w": "io"}),
    "split weight": (lambda p, x: [x @ w for w in jnp.split(p["w"], 2, axis=1)], {"w": (8, 10)}, {"w": "io"}),
    "heads": (heads, {"w": (8, 2, 3), "v": (2, 3, 8)}, {"w": "ioo", "v": "iio"}),
    "scan": (over_layers(0), {"w": (3, 8, 8)}, {"w": "sio"}),
    "scan over the middle axis": (over_layers(1), {"w": (8, 3, 8)}, {"w": "iso"}),
    "layers by index": (by_index, {"w": (3, 8, 8)}, {"w": "sio"}),
    "experts": (lambda p, x: jnp.einsum("bd,edf->bef", x, p["w"]), {"w": (3, 8, 5)}, {"w": "sio"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_weight_is_the_weight_it_stands_for(case):
    f, shapes, layouts = CASES[case]
    params = {name: draw(*shape, n=n) for n, (name, shape) in enumerate(shapes.items())}
    x = draw(4, 8, n=9)
    base = jlora.quantise(params, Int4(group=4), layouts=layouts)
    plain = jlora.dequantise(base)
    assert all(isinstance(leaf, jlora.QuantisedLeaf) for leaf in base.values())
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), plain, params)
    # the largest of each group of four is off by no more than the rounded scale's half
    for name, w in params.items():
        assert 0 < np.abs(plain[name] - w).max() <= np.abs(w).max() / 14 * 1.01
    total = lambda f: lambda p, x: sum(jnp.sum(y**2) for y in jax.tree.leaves(f(p, x)))
    got = jax.jit(jax.value_and_grad(total(jlora.lift(f, strict=True)), argnums=1))(base, x)
    want = jax.jit(jax.value_and_grad(total(f), argnums=1))(plain, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)


def test_a_stack_is_its_matrices_quantised_alone():
    w = draw(3, 2, 70, 6)
    whole = jlora.quantise({"w": w}, NF4(), layouts={"w": "ssio"})["w"].materialise()
    for n in range(2):
        alone = jlora.quantise({"w": w[n, 1]}, NF4())["w"].materialise()
        np.testing.assert_allclose(whole[n, 1], alone, rtol=0, atol=1e-6)


def test_a_convolution():
    w, x = draw(3, 1, 5), draw(4, 8, n=1)
    f = lambda p, x: jax.lax.conv_general_dilated(
        x[:, :, None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    base = jlora.quantise({"w": w}, "int8", layouts={"w": "iio"})
    got = jlora.lift(f, strict=True)(base, x)
    np.testing.assert_allclose(got, f(jlora.dequantise(base), x), rtol=1e-5, atol=1e-6)


L, D, F = 5, 32, 48


def layers(p, x):
    def one(c, w):
        return c + jax.nn.gelu(c @ w["up"]) @ w["down"], None

    return jax.lax.scan(one, x, p)[0]


def stack():
    return {"up": draw(L, D, F) / 6, "down": draw(L, F, D, n=1) / 7}


def test_no_weight_is_kept_from_the_forward_to_the_backward_pass():
    base = {"up": jlora.quantise(stack(), "nf4", layouts={".*": "sio"})["up"]}
    base["down"] = jlora.quantise(stack(), "int8", layouts={".*": "sio"})["down"]
    frozen, lora = jlora.lorafy(base, 2, layouts={".*": "sio"})
    f = jlora.lift(layers, strict=True)
    loss = lambda lora, x, frozen: jnp.sum(f(jlora.combine(frozen, lora), x) ** 2)
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(lora, draw(20, D, n=2), frozen).compile().as_text()
    kept = re.findall(rf"f32\[{L},(?:{D},{F}|{F},{D})\]", text)
    assert not kept, f"a stack of weights is written out: {kept[:3]}"
    assert re.search(rf"f32\[(?:1,)?{D},{F}\]", text), "one layer's weight is"


def test_quantising_again_on_shapes_counts_the_same_bytes():
    shapes = jax.eval_shape(stack)
    for scheme in ("nf4", "int8", Int4(16, zero_point=True)):
        planned = jlora.quantise(shapes, scheme, layouts={".*": "sio"})
        real = jlora.quantise(stack(), scheme, layouts={".*": "sio"})
        assert nbytes(planned) == nbytes(real) and jax.tree.structure(planned) == jax.tree.structure(real)
        assert all(leaf.shape == w.shape for leaf, w in zip(planned.values(), shapes.values(), strict=True))
    assert nbytes(jlora.quantise(shapes, "int8", layouts={".*": "sio"})) == 2 * L * D * F + 4 * L * (D + F)
    frozen, lora = jlora.lorafy(real, 2, layouts={".*": "sio"})
    assert f"of {2 * L * D * F:,} trained" in jlora.summary(frozen, lora)


def test_a_merge_is_on_what_the_codes_mean_and_says_so():
    base = jlora.quantise(stack(), "nf4", layouts={".*": "sio"})
    frozen, lora = jlora.lorafy(base, 2, layouts={".*": "sio"}, targets="up")
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    with pytest.warns(MergedAsFloats, match="2 weights"):
        merged = jlora.merge(frozen, lora)
    factors = lora["up"]
    want = jlora.dequantise(base)["up"] + jnp.einsum("sir,sro->sio", factors.lora_a, factors.lora_b)
    np.testing.assert_allclose(merged["up"], want, rtol=0, atol=1e-6)
    assert merged["down"].dtype == jnp.float32

    again, lost = merge_quantised(frozen, lora)
    np.testing.assert_array_equal(again["down"].parts["codes"], base["down"].parts["codes"])
    error = jnp.linalg.norm(again["up"].materialise() - want)
    change = jnp.linalg.norm(want - jlora.dequantise(base)["up"])
    np.testing.assert_allclose(lost["up"], [error / jnp.linalg.norm(want), error / change], rtol=1e-4)
    assert list(lost) == ["up"]


def test_what_cannot_be_is_refused():
    base = jlora.quantise(stack(), "nf4", layouts={".*": "sio"})
    with pytest.raises(ValueError, match="init 'pissa' changes the base, and down is a QuantisedLeaf"):
        jlora.lorafy(base, 2, layouts={".*": "sio"}, init="pissa")
    with pytest.raises(ValueError, match="up is a QuantisedLeaf, and only a plain weight trains whole"):
        jlora.lorafy(base, 2, layouts={".*": "sio"}, targets="down", train="up")
    layers = jlora.quantise({f"layers_{n}": {"up": draw(8, 8)} for n in range(2)} | {"head": draw(8, 4)}, "int8")
    with pytest.raises(ValueError, match="layers_1/up is a QuantisedLeaf, and only a plain weight trains"):
        full.top(layers, 1)
    plain = {**layers, "layers_1": {"up": draw(8, 8)}}
    with pytest.raises(ValueError, match="head is a QuantisedLeaf, and only a plain weight trains"):
        full.top(plain, 1, also="head")
    _, top = full.top(plain, 1)  # below the top they may be
    assert top["layers_0"]["up"] is None and top["layers_1"]["up"].shape == (8, 8)
    with pytest.raises(ValueError, match="scheme 'nf3' is not known: nf4, int8, int4"):
        jlora.quantise(stack(), "nf3", layouts={".*": "sio"})
    with pytest.raises(ValueError, match=r"up .* holds infinities or NaN"):
        jlora.quantise({"up": draw(8, 8).at[1, 1].set(jnp.nan)}, "nf4")
    with pytest.raises(ValueError, match=r"the axes of w \[2, 8, 8\] cannot be told"):
        jlora.quantise({"w": draw(2, 8, 8)}, "nf4")


def test_pissa_first_and_then_quantised_starts_nearer_the_base():
    params = stack()
    frozen, lora = jlora.lorafy(params, 8, init="pissa", layouts={".*": "sio"})
    frozen = jlora.quantise(frozen, "nf4", layouts={".*": "sio"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergedAsFloats)
        started = jlora.merge(frozen, lora)
    plain = jlora.dequantise(jlora.quantise(params, "nf4", layouts={".*": "sio"}))
    off = lambda tree: float(jnp.linalg.norm(tree["up"] - params["up"]))
    assert off(started) < off(plain)


def test_the_weight_is_written_out_in_the_dtype_of_the_product():
    leaf = jlora.quantise({"w": draw(64, 8).astype(jnp.bfloat16)}, "nf4")["w"]
    assert leaf.dtype == leaf.materialise().dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(jlora.lift(lambda w, x: x @ w.astype(jnp.float16), strict=True))(leaf, draw(3, 64))
    assert "f16[64,8]" in str(jaxpr) and "bf16[64,8]" not in str(jaxpr)


def test_layouts_reads_a_quantised_tree_as_the_plain_one():
    x = draw(20, D)
    base = jlora.quantise(stack(), "int8", layouts={".*": "sio"})
    assert jlora.layouts(layers, base, x) == jlora.layouts(layers, stack(), x)


def test_a_leaf_says_how_its_arrays_are_split():
    from jax.sharding import PartitionSpec as P

    leaf = jlora.quantise(stack(), "nf4", layouts={".*": "sio"})["up"]
    specs = leaf.shard_specs(P(None, "fsdp", "tensor"), exact=False).parts
    assert specs["codes"] == specs["absmax"] == P(None, "fsdp", "tensor") and specs["outer"] == P(None)
    assert leaf.shard_specs(P(None, None, "tensor")) is None  # blocks of 256 absmax run across outputs
    single = jlora.quantise(stack(), "int8", layouts={".*": "sio"})["up"]
    assert single.shard_specs(P(None, None, "tensor")).parts["scale"] == P(None, "tensor")
    assert single.shard_specs(P(None, "tensor", None)) is None
