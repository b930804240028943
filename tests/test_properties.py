"""One table for every layout and transformation: lifted = dense, strictly, with right gradients and at rest equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jlora
from jlora.methods import dora

KEY = jax.random.key(7)


def normal(n, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, n), shape)


@jax.custom_jvp
def double(x):
    return 2.0 * x


double.defjvp(lambda primals, tangents: (double(primals[0]), 2.0 * tangents[0]))


@jax.custom_vjp
def through(x, w):
    return jnp.tanh(x @ w)


def _through_fwd(x, w):
    return through(x, w), (x, w)


def _through_bwd(kept, dy):
    return jax.vjp(lambda x, w: jnp.tanh(x @ w), *kept)[1](dy)


through.defvjp(_through_fwd, _through_bwd)


def scanned(x, w):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]


def indexed(x, w):
    return lax.fori_loop(0, w.shape[0], lambda i, c: jnp.tanh(c @ w[i]), x)


def carried(x, w):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[2]), s[2]), (0, x, w))[1]


def switched(x, w):
    return lax.switch(jnp.int32(1), [lambda: x @ w, lambda: jnp.sin(x) @ w, lambda: x @ (w.T).T])


def sharded(x, w):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(x, w)


def constrained(x, w):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return x @ lax.with_sharding_constraint(w, jax.sharding.NamedSharding(mesh, P(None, "data")))


def conv(spec, groups=1, **options):
    def f(x, w):
        n = w.ndim - 2
        return lax.conv_general_dilated(x, w, (1,) * n, "SAME", dimension_numbers=spec, feature_group_count=groups)

    return f


def fused(x, w):
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    a, b, _ = jnp.split(w, 3, axis=-1)
    return q + k * v + x @ a - x @ b


def ragged(contracted, rows=0, group=0):
    numbers = lax.RaggedDotDimensionNumbers((contracted, ((), ())), (rows,), (group,))
    return lambda x, w: lax.ragged_dot_general(x, w, SIZES, numbers)


SIZES = jnp.array([1, 3, 2])
IDS = jnp.array([[0, 3, 3], [5, 1, 2]])
# name: (function of (x, w), x's shape, w's shape, letters)
CASES = {
    "matmul": (lambda x, w: x @ w, (4, 6), (6, 5), "io"),
    "transposed": (lambda x, w: x @ w.T, (4, 5), (6, 5), "oi"),
    "weight first": (lambda x, w: lax.dot_general(w, x, (((0,), (1,)), ((), ()))), (4, 6), (6, 5), "io"),
    "heads": (lambda x, w: jnp.einsum("btd,dhk->bthk", x, w), (2, 3, 6), (6, 2, 4), "ioo"),
    "heads back": (lambda x, w: jnp.einsum("bthk,hkd->btd", x, w), (2, 3, 2, 4), (2, 4, 6), "iio"),
    "experts": (lambda x, w: jnp.einsum("ecd,edf->ecf", x, w), (3, 4, 6), (3, 6, 5), "sio"),
    "experts out first": (lambda x, w: jnp.einsum("ecd,fed->ecf", x, w), (3, 4, 6), (5, 3, 6), "osi"),
    "expert of a token": (lambda x, w: jnp.einsum("td,tdf->tf", x, w[IDS[0] % 3]), (3, 6), (3, 6, 5), "sio"),
    "experts in groups": (lambda x, w: lax.ragged_dot(x, w, SIZES), (6, 4), (3, 4, 5), "sio"),
    "experts in groups, a cut": (lambda x, w: lax.ragged_dot(x, w[1:4], SIZES), (6, 4), (5, 4, 5), "sio"),
    "experts in groups, output first": (ragged(((1,), (2,))), (6, 4), (3, 5, 4), "soi"),
    "experts in groups, any order": (ragged(((0,), (2,)), rows=1, group=1), (4, 6), (5, 3, 4), "osi"),
    "experts in groups, two axes summed": (ragged(((1, 2), (1, 2))), (6, 2, 4), (3, 2, 4, 5), "siio"),
    "fused": (fused, (4, 6), (6, 9), "io"),
    "reshaped": (lambda x, w: jnp.einsum("td,dhk->thk", x, w.reshape(6, 2, 4)), (4, 6), (6, 8), "io"),
    "embedding": (lambda x, w: x + w[IDS], (2, 3, 4), (6, 4), "io"),
    "tied": (lambda x, w: (x + w[IDS]) @ w.T, (2, 3, 4), (6, 4), "io"),
    "bf16 cast": (lambda x, w: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (4, 6), (6, 5), "io"),
    "times a number": (lambda x, w: x @ (0.5 * w), (4, 6), (6, 5), "io"),
    "times a traced number": (lambda x, w: x @ (w * jnp.sin(x[0, 0])), (4, 6), (6, 5), "io"),
    "by a number": (lambda x, w: x @ (w / (1.0 + x[0, 0] ** 2)).T, (4, 5), (6, 5), "oi"),
    "negated": (lambda x, w: x @ -w, (4, 6), (6, 5), "io"),
    "conv of a scaled kernel": (
        lambda x, w: conv(("NWC", "WIO", "NWC"))(x, w * jnp.sin(x[0, 0, 0])),
        (2, 7, 4),
        (3, 4, 6),
        "iio",
    ),
    "stopped gradient": (lambda x, w: x @ lax.stop_gradient(w) + jnp.sin(x) @ w, (4, 6), (6, 5), "io"),
    "conv 1-D": (conv(("NWC", "WIO", "NWC")), (2, 7, 4), (3, 4, 6), "iio"),
    "conv 2-D": (conv(("NHWC", "HWIO", "NHWC")), (2, 5, 5, 4), (3, 3, 4, 6), "iiio"),
    "conv 2-D channels first": (conv(("NCHW", "OIHW", "NCHW")), (2, 4, 5, 5), (6, 4, 3, 3), "oiii"),
    "conv 3-D": (conv(("NDHWC", "DHWIO", "NDHWC")), (1, 3, 3, 3, 2), (2, 2, 2, 2, 4), "iiiio"),
    "conv grouped": (conv(("NWC", "WIO", "NWC"), groups=2), (2, 7, 4), (3, 2, 6), "iio"),
    "jit": (lambda x, w: jax.jit(lambda x, w: x @ w)(x, w), (4, 6), (6, 5), "io"),
    "remat": (lambda x, w: jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w), (4, 6), (6, 5), "io"),
    "scan": (scanned, (4, 6), (3, 6, 6), "sio"),
    "scan of remat": (
        lambda x, w: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, w)[0],
        (4, 6),
        (3, 6, 6),
        "sio",
    ),
    "scan, a constant": (
        lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0],
        (4, 6),
        (6, 6),
        "io",
    ),
    "loop over a stack": (indexed, (4, 6), (3, 6, 6), "sio"),
    "cond": (lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w, lambda: jnp.sin(x) @ w), (4, 6), (6, 5), "io"),
    "switch": (switched, (4, 6), (6, 5), "io"),
    "custom_jvp": (lambda x, w: double(x @ w), (4, 6), (6, 5), "io"),
    "custom_vjp": (through, (4, 6), (6, 5), "io"),
    "shard_map": (sharded, (4, 6), (6, 5), "io"),
    "sharding constraint": (constrained, (4, 6), (6, 5), "io"),
    "vmap": (lambda x, w: jax.vmap(lambda x: x @ w)(x), (4, 6), (6, 5), "io"),
    "vmap of w": (lambda x, w: jax.vmap(lambda x, w: w.T @ x)(x, w), (3, 6), (3, 6, 5), "sio"),
}
FORWARD_ONLY = {"while": (carried, (4, 6), (6, 6), "io")}


def adapted(shape, letters, **options):
    params = {"w": normal(1, *shape)}
    frozen, lora = jlora.lorafy(params, 2, alpha=4, key=KEY, layouts={"w": letters}, targets="w", **options)
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.fold_in(KEY, x.size), x.shape), lora)
    return frozen, lora, moved


def close(got, want, tol=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * float(np.abs(want).max()))


@pytest.mark.parametrize("name", [*CASES, *FORWARD_ONLY])
def test_lifted_is_dense(name):
    f, x_shape, w_shape, letters = {**CASES, **FORWARD_ONLY}[name]
    x = normal(0, *x_shape)
    frozen, start, moved = adapted(w_shape, letters)
    lifted = jlora.lift(lambda p, x: f(x, p["w"]), strict=True)
    base = f(x, frozen["w"])
    np.testing.assert_array_equal(lifted(jlora.combine(frozen, start), x), base)  # op by op: bit for bit
    close(jax.jit(lifted)(jlora.combine(frozen, start), x), base, 1e-6)
    want = f(x, jlora.merge(frozen, moved)["w"])
    assert np.abs(want - base).max() > 1e-3
    tol = 2e-2 if "bf16" in name else 1e-5
    close(lifted(jlora.combine(frozen, moved), x), want, tol)
    close(jax.jit(lifted)(jlora.combine(frozen, moved), x), want, tol)


@pytest.mark.filterwarnings("ignore:.*custom_vjp's own derivative:jlora.MaterialisedWarning")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_dense_function(name):
    f, x_shape, w_shape, letters = CASES[name]
    x = normal(0, *x_shape)
    frozen, _, moved = adapted(w_shape, letters)
    lifted = jlora.lift(lambda p, x: f(x, p["w"]), strict=name != "custom_vjp")
    weigh = jnp.cos(jnp.arange(f(x, frozen["w"]).size)).reshape(f(x, frozen["w"]).shape)

    def loss(lora):
        return jnp.sum(weigh * lifted(jlora.combine(frozen, lora), x))

    def dense(lora):
        return jnp.sum(weigh * f(x, jlora.combine(frozen, lora)["w"].materialise()))

    got, want = jax.jit(jax.grad(loss))(moved), jax.grad(dense)(moved)
    assert jax.tree.structure(got) == jax.tree.structure(moved)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(g, w, 5e-2 if "bf16" in name else 2e-5)


@pytest.mark.filterwarnings("ignore:.*custom_vjp's own derivative:jlora.MaterialisedWarning")
@pytest.mark.parametrize("name", ["matmul", "heads back", "conv 2-D", "tied", "scan", "custom_vjp", "experts"])
def test_gradients_are_the_numerical_ones(name):
    f, x_shape, w_shape, letters = CASES[name]
    with jax.enable_x64(True):
        x = normal(0, *x_shape)
        frozen, _, moved = adapted(w_shape, letters, dtype=jnp.float64)
        frozen = jax.tree.map(lambda w: w.astype(jnp.float64), frozen)
        loss = lambda lora: jnp.sum(jnp.sin(jlora.lift(lambda p, x: f(x, p["w"]))(jlora.combine(frozen, lora), x)))
        flat, unravel = jax.flatten_util.ravel_pytree(moved)
        along = jnp.cos(3.0 * jnp.arange(flat.size))
        slope = (loss(unravel(flat + 1e-6 * along)) - loss(unravel(flat - 1e-6 * along))) / 2e-6
        exact = jax.flatten_util.ravel_pytree(jax.grad(loss)(moved))[0] @ along
        np.testing.assert_allclose(slope, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_layouts_reads_off_the_same_letters(name):
    f, x_shape, w_shape, letters = CASES[name]
    x = normal(0, *x_shape)
    found = jlora.layouts(lambda p, x: f(x, p["w"]), {"w": jnp.zeros(w_shape)}, x)["w"]
    # an index of experts by token is the one that needs two experts: it is the stacked axis
    assert found.letters == letters
    assert found.kind == ("embedding" if name in ("embedding", "tied") else "conv" if "conv" in name else "linear")
    assert found.tied == (name == "tied")


def test_experts_in_groups_with_dropout_and_on_codes():
    x, params = normal(0, 6, 64), {"w": normal(1, 3, 64, 32)}
    f = jlora.lift(lambda p: lax.ragged_dot(x, p["w"], SIZES), strict=True)
    for base in (params, jlora.quantise(params, targets="w", layouts={"w": "sio"})):
        frozen, lora = jlora.lorafy(base, 2, key=KEY, targets="w", layouts={"w": "sio"})
        moved = jax.tree.map(lambda v: v + 0.1, lora)
        want = lax.ragged_dot(x, jlora.combine(frozen, moved)["w"].materialise(), SIZES)
        close(f(jlora.combine(frozen, moved)), want)
        dropped = lax.map(lambda key: f(jlora.combine(frozen, moved, dropout=0.2, key=key)), jax.random.split(KEY, 400))
        assert jnp.std(dropped, 0).min() > 0
        close(jnp.mean(dropped, 0), want, 0.1)
        grads = jax.grad(lambda lora: jnp.sum(f(jlora.combine(frozen, lora)) ** 2))(moved)
        assert all(jnp.any(g) for g in jax.tree.leaves(grads))


def test_groups_that_are_not_the_stack_are_materialised():
    x, (frozen, _, moved) = normal(0, 6, 4), adapted((3, 4, 5), "ios")
    with pytest.warns(jlora.MaterialisedWarning, match="materialised for ragged_dot_general"):
        got = jlora.lift(lambda p: lax.ragged_dot(x, p["w"], SIZES))(jlora.combine(frozen, moved))
    close(got, lax.ragged_dot(x, jlora.merge(frozen, moved)["w"], SIZES))


def test_a_number_keeps_its_gradient_and_its_precision():
    x, (frozen, _, moved) = normal(0, 4, 6), adapted((6, 5), "io")
    loss = lambda params: lambda c: jnp.sum(jnp.sin(jlora.lift(lambda p: x @ (p["w"] * c / 3.0), strict=True)(params)))
    got, want = (jax.grad(loss(p))(0.7) for p in (jlora.combine(frozen, moved), jlora.merge(frozen, moved)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_number_in_another_precision_than_the_factors():
    x, (frozen, _, moved) = normal(0, 4, 6).astype(jnp.bfloat16), adapted((6, 5), "io")
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), frozen)
    got = jlora.lift(lambda p: x @ (p["w"] * x[0, 0]), strict=True)(jlora.combine(half, moved))
    assert got.dtype == jnp.bfloat16
    want = x.astype(jnp.float32) @ jlora.merge(frozen, moved)["w"] * x[0, 0].astype(jnp.float32)
    close(got.astype(jnp.float32), want, 2e-2)


def test_a_stopped_gradient_with_dropout_and_on_codes():
    x, params = normal(0, 4, 64), {"w": normal(1, 64, 32)}
    f = jlora.lift(lambda p: jnp.sum(x @ lax.stop_gradient(p["w"])), strict=True)
    for base in (params, jlora.quantise(params)):
        frozen, lora = jlora.lorafy(base, 2, key=KEY, targets="w")
        grads = jax.grad(lambda lora: f(jlora.combine(frozen, lora, dropout=0.5, key=KEY)))(lora)
        assert not any(jnp.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("f", [lambda w: 1.0 / (w + 9.0), lambda w: w * w, lambda w: w * jnp.arange(5.0)])
def test_what_is_no_multiple_of_the_weight_is_materialised(f):
    x, (frozen, _, moved) = normal(0, 4, 6), adapted((6, 5), "io")
    with pytest.warns(jlora.MaterialisedWarning, match=r"w \[6, 5\] was materialised"):
        got = jlora.lift(lambda p: x @ f(p["w"]))(jlora.combine(frozen, moved))
    close(got, x @ f(jlora.merge(frozen, moved)["w"]))


@pytest.mark.parametrize("f", [lambda w: 3.0 * w, lambda w: -w])
def test_a_method_whose_product_is_not_linear_in_the_weight_materialises(f):
    x, params = normal(0, 4, 6), {"w": normal(1, 6, 5)}
    frozen, lora = dora.make(params, rank=2, targets="w", key=KEY)
    combined = jlora.combine(frozen, jax.tree.map(lambda v: v + 0.3, lora))
    with pytest.warns(jlora.MaterialisedWarning, match="w \\[6, 5\\] was materialised"):
        got = jlora.lift(lambda p: x @ f(p["w"]))(combined)
    close(got, x @ f(combined["w"].materialise()))


def tripled(x, w):
    """`through` with the weight itself in a function that has a derivative of its own."""

    @jax.custom_jvp
    def f(w):
        return 3.0 * w

    f.defjvp(lambda primals, tangents: (f(primals[0]), 3.0 * tangents[0]))
    return x @ f(w)


@pytest.mark.parametrize("f, name", [(through, "custom_vjp"), (tripled, "custom_jvp")])
def test_a_derivative_of_ones_own_gets_the_weight_and_it_is_told(f, name):
    x, (frozen, _, moved) = normal(0, 4, 6), adapted((6, 5), "io")
    loss = lambda lora, strict: jnp.sum(jlora.lift(lambda p: f(x, p["w"]), strict=strict)(jlora.combine(frozen, lora)))
    with pytest.warns(jlora.MaterialisedWarning, match=f"w \\[6, 5\\] was materialised for {name}'s own derivative"):
        jax.grad(loss)(moved, False)
    with pytest.raises(ValueError, match="strict=True forbids"):
        jax.grad(loss)(moved, True)


def test_a_table_is_told_by_one_token_too():
    tied = lambda p, tokens: p["w"][tokens] @ p["w"].T
    found = jlora.layouts(tied, {"w": jnp.zeros((7, 4))}, jnp.zeros((1, 1), int))["w"]
    assert (found.kind, found.letters, found.tied) == ("embedding", "io", True)


@pytest.mark.parametrize(
    "f, tied, letters",
    [
        (lambda table, ids: jax.vmap(lambda t, i: t[i])(table, ids), False, "sio"),
        (lambda table, ids: jax.vmap(lambda t, i: t[i] @ t.T)(table, ids), True, "sio"),
        (lambda table, ids: jax.vmap(lambda t, i: t[i], (1, 0))(table, ids), False, "iso"),
    ],
)
def test_an_ensemble_of_tables(f, tied, letters):
    ids = jnp.arange(3 * 2 * 4).reshape(3, 2, 4) % 5
    params = {"w": jnp.zeros([{"s": 3, "i": 7, "o": 4}[ax] for ax in letters])}
    found = jlora.layouts(lambda p: f(p["w"], ids), params)["w"]
    assert (found.kind, found.letters, found.tied) == ("embedding", letters, tied)


def test_a_matrix_picked_from_each_stack_of_an_ensemble():
    x, which = normal(0, 3, 2, 4), jnp.array([[0, 6], [3, 3], [1, 2]])
    one = lambda x, w, which: jnp.einsum("ti,tio->to", x, w[which])
    found = jlora.layouts(lambda p: jax.vmap(one)(x, p["w"], which), {"w": jnp.zeros((3, 7, 4, 5))})["w"]
    assert (found.kind, found.letters) == ("linear", "ssio")
