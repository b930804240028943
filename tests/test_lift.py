"""`lift`: the same results as on materialised weights, without materialising."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraLeaf, lift
from jlora.leaves import ImplicitLeaf, MaterialisedWarning
from jlora.methods import dora

L, D, R = 3, 8, 2


def leaves():
    k = jax.random.split(jax.random.key(0), 6)
    stack = LoraLeaf(
        jax.random.normal(k[0], (L, D, D)),
        jax.random.normal(k[1], (L, D, R)),
        jax.random.normal(k[2], (L, R, D)),
        a_axes=(0, 1, -1),
        b_axes=(0, -1, 2),
        scaling=0.5,
        path="stack",
    )
    table = LoraLeaf(
        jax.random.normal(k[3], (11, D)),
        jax.random.normal(k[4], (11, R)),
        jax.random.normal(k[5], (R, D)),
        path="table",
    )
    return stack, table


def model(w, table, ids):
    x = table[ids]

    def body(c, w):
        return jax.checkpoint(lambda c: jax.nn.relu(c @ w))(c), None

    y, _ = jax.lax.scan(body, x, w)
    y = jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i].T), y)
    y = jax.lax.cond(y.sum() > 0, lambda: y @ w[0], lambda: y @ w[1].reshape(D, 2, 4).reshape(D, D))
    y = jax.jit(lambda y, w: y @ w)(y, w[2])
    return jnp.einsum("bd,ldk->lbk", y, w), y @ table.T


@pytest.mark.parametrize("jitted", [False, True])
def test_a_model_with_everything_in_it(jitted):
    stack, table = leaves()
    ids = jnp.array([1, 4, 2, 9])
    lifted = lift(model, strict=True)
    outs = (jax.jit(lifted) if jitted else lifted)(stack, table, ids)
    for out, want in zip(outs, model(stack.materialise(), table.materialise(), ids), strict=True):
        np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("fill", [None, 0, 7])
@pytest.mark.parametrize("which", [0, 1])
def test_rows_past_the_end_are_what_the_lookup_fills_them_with(which, fill):
    leaf = leaves()[which]
    f = lambda w: jnp.tanh(w.at[jnp.array([1, 99, 2])].get(mode="fill", fill_value=fill))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterialisedWarning)  # the tanh of rows of a stack
        got = lift(f)(leaf)
    np.testing.assert_allclose(got, f(leaf.materialise()), rtol=1e-5)


def test_what_the_function_is_given():
    seen = []

    def f(w, *rest):
        seen.append([isinstance(value, jax.core.Tracer) for value in (w, *rest)])
        return jnp.ones((1, 11)) @ w

    table = leaves()[1]
    rest = (jnp.ones(2), np.ones(2), np.float32(1), 2, "text", None)
    lift(f)(table, *rest)
    lift(f)(table.materialise(), *rest)  # no leaf: called as it is
    assert seen == [[True] * 4 + [False] * 3, [False] * 7]
    assert lift(lambda text: text + "b")("a") == "ab"


def test_both_operands_are_one_variable():
    stack, _ = leaves()
    w = LoraLeaf(stack.w[0], stack.lora_a[0], stack.lora_b[0], path="w")
    with pytest.warns(MaterialisedWarning, match="dot_general"):
        got = lift(lambda w: jax.lax.dot(w, w))(w)  # jnp.matmul would call a function with a variable for each
    want = w.materialise() @ w.materialise()
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_specs_of_a_leafs_parts():
    stack, table = leaves()
    stack = dataclasses.replace(stack, key=jax.random.split(jax.random.key(0), L), key_axes=(0,))
    specs = stack.shard_specs(P("s", "x"))
    assert (specs.w, specs.lora_a, specs.lora_b) == (P("s", "x"), P("s", "x", None), P("s", None, None))
    assert specs.key == P("s")
    specs = table.shard_specs(P(None, "y"))
    assert (specs.lora_a, specs.lora_b, specs.key) == (P(None, None), P(None, "y"), None)
    specs = stack.shard_specs(P("s", None, "y"))
    assert (specs.lora_a, specs.lora_b) == (P("s", None, None), P("s", None, "y"))
    specs = stack.shard_specs(P(None, "x"))  # shorter than the weight has axes
    assert (specs.lora_a, specs.lora_b) == (P(None, "x", None), P(None, None, None))
    assert ImplicitLeaf().shard_specs(P()) is None and dataclasses.replace(stack, w=Bare()).shard_specs(P()) is None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Bare(ImplicitLeaf):
    """A stack of ones that knows no more than it must."""

    shape, dtype, path = (L, D, D), jnp.float32, ""

    def materialise(self):
        return jnp.ones(self.shape)


def test_a_leaf_that_knows_no_more_than_it_must():
    for ask in (lambda: ImplicitLeaf().shape, lambda: ImplicitLeaf().dtype, ImplicitLeaf().materialise):
        with pytest.raises(NotImplementedError):
            ask()
    assert Bare().ndim == 3
    stack = dataclasses.replace(leaves()[0], w=Bare())
    f = lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    for leaf in (Bare(), stack):
        assert leaf.unstack() is None
        with pytest.warns(MaterialisedWarning, match="a scan over it"):
            got = lift(f)(leaf, jnp.ones((2, D)))
        np.testing.assert_allclose(got, f(leaf.materialise(), jnp.ones((2, D))), atol=1e-5)
        with pytest.raises(ValueError, match="a scan over it, which strict=True forbids"):
            lift(f, strict=True)(leaf, jnp.ones((2, D)))


def test_a_call_without_lift_is_told():
    stack, table = leaves()
    for call in (lambda: jnp.ones((2, 11)) @ table, lambda: jnp.tanh(stack), lambda: jnp.asarray(table)):
        with pytest.raises(TypeError, match=r"(stack|table) is a LoraLeaf, no array: call jlora.lift\(f\), not f"):
            call()


def test_numbers_of_numpy_are_those_of_jax():
    table = leaves()[1]
    x = np.ones((2, 11))  # float64, which JAX reads as float32 without a word
    got = lift(lambda w, x: x @ w, strict=True)(table, x)
    np.testing.assert_allclose(got, jnp.asarray(x) @ table.materialise(), rtol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_a_weight_in_the_memory_of_the_host(whole):
    stack, _ = leaves()
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    held = jax.device_put(stack if whole else stack.w, host)
    held = held if whole else dataclasses.replace(stack, w=held)
    to = jax.memory.Space.Device if whole else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    f = lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ jax.device_put(w, to)), None), x, w)[0]
    got = jax.jit(lift(f, strict=True))(held, jnp.ones((2, D)))
    np.testing.assert_allclose(got, f(stack.materialise(), jnp.ones((2, D))), atol=1e-5)
    merged = jlora.merge({"w": held.w}, {"w": jlora.LoraFactors(held.lora_a, held.lora_b, 0.5, "sio")})["w"]
    assert merged.sharding.memory_kind == "pinned_host"
    np.testing.assert_allclose(merged, stack.materialise(), atol=1e-5)


def test_a_barrier_keeps_the_factors_apart():
    _, table = leaves()
    f = lambda w, x: jnp.matmul(*lax.optimization_barrier((x, w)))
    text = str(jax.make_jaxpr(lift(f, strict=True))(table, jnp.ones((2, 11))))
    assert "optimization_barrier" in text
    x = jnp.ones((2, 11))
    np.testing.assert_allclose(lift(f, strict=True)(table, x), f(table.materialise(), x), rtol=1e-5)


def kernel(x, w):
    """What compiles for a TPU and not for a CPU."""

    def double(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    return pallas.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x) @ w


@pytest.mark.parametrize("jitted", [False, True])
def test_a_branch_is_compiled_for_its_own_platforms_alone(jitted):
    _, table = leaves()
    x = jnp.ones((2, 11))
    f = lambda w, x: lax.platform_dependent(x, w, tpu=kernel, default=lambda x, w: x @ w)
    lifted = lift(f, strict=True)
    got = (jax.jit(lifted) if jitted else lifted)(table, x)
    np.testing.assert_allclose(got, f(table.materialise(), x), rtol=1e-5)


OUTSIDE = {
    "vmap": lambda f, combined, x: jax.vmap(f, (0, None))(combined, x),
    "scan": lambda f, combined, x: lax.scan(lambda c, row: (f(row, c), None), x, combined),
    "an index": lambda f, combined, x: f(jax.tree.map(lambda a: a[0], combined), x),
}


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("make", ["lora", "dora", "lora on codes", "codes"])
def test_an_axis_that_is_mapped_away_outside_is_told(how, make):
    params, layouts = {"w": jax.random.normal(jax.random.key(1), (3, 64, 64))}, {"w": "sio"}
    if "codes" in make:
        params = jlora.quantise(params, targets="w", layouts=layouts)
    options = {"rank": 2, "targets": "w", "layouts": layouts, "key": jax.random.key(0)}
    if make == "codes":
        combined = params
    else:
        combined = jlora.combine(*(dora.make if make == "dora" else jlora.lorafy)(params, **options))
    with pytest.raises(ValueError, match=r"^w: an axis was mapped away outside lift: write lift\(vmap\(f\)\)"):
        OUTSIDE[how](lift(lambda p, x: x @ p["w"]), combined, jnp.ones((4, 64)))


def test_vmap_within_lift_and_over_adapters_outside():
    params, x = {"w": jax.random.normal(jax.random.key(1), (3, 6, 5))}, jnp.ones((4, 6))
    frozen, lora = jlora.lorafy(params, 2, targets="w", layouts={"w": "sio"}, key=jax.random.key(0))
    inside = lift(jax.vmap(lambda p, x: x @ p["w"], (0, None)), strict=True)
    np.testing.assert_allclose(
        inside(jlora.combine(frozen, lora), x), jnp.einsum("ti,sio->sto", x, params["w"]), rtol=1e-5
    )
    frozen, lora = jlora.lorafy({"w": params["w"][0]}, 2, targets="w", key=jax.random.key(0))
    two = jax.tree.map(lambda v: jnp.stack([v, v + 1.0]), lora)
    f = lift(lambda p: x @ p["w"], strict=True)
    got = jax.vmap(lambda lora: f(jlora.combine(frozen, lora)))(two)
    np.testing.assert_allclose(got[0], f(frozen), rtol=1e-5)
