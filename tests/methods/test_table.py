"""One table runs every method: start equals base, gradients and state only for what trains, merges, dtypes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import KEY, TOKENS, apply_of, encoder, jitter, llama, page, stacks

import jlora
from jlora.merging import MergedAsFloats
from jlora.methods import adalora, adapter, bitfit, dora, eva, full, ia3
from jlora.methods.together import together
from jlora.tree import size

# name: (make, tolerance of the start, whether it merges)
METHODS = {
    "lora": (lambda p: jlora.lorafy(p, 2, key=KEY, layouts=stacks(p)), 2e-6, True),
    "dora": (lambda p: dora.make(p, 2, key=KEY, layouts=stacks(p)), 1e-5, True),
    "dora, pissa": (lambda p: dora.make(p, 2, key=KEY, layouts=stacks(p), init="pissa"), 1e-4, True),
    "adalora": (lambda p: adalora.make(p, 2, key=KEY, layouts=stacks(p)), 2e-6, True),
    "eva": (lambda p: eva.make(p, 2, apply_of(p), [TOKENS], key=KEY, layouts=stacks(p)), 2e-6, True),
    "vera, of the docs": (lambda p: page("adding-a-method").make(p, 4, layouts=stacks(p)), 2e-6, True),
    "ia3": (lambda p: ia3.make(p), 2e-6, True),
    "full": (lambda p: full.make(p), 2e-6, True),
    "top 2": (lambda p: full.top(p, 2), 2e-6, True),
    "norms": (lambda p: bitfit.norms(p), 2e-6, True),
    "bitfit": (lambda p: bitfit.make(p), 2e-6, True),
    "houlsby": (lambda p: adapter.make(p, 3, key=KEY), 2e-6, False),
    "pfeiffer, dropped": (lambda p: adapter.make(p, 3, kind="pfeiffer", drop=1, key=KEY), 2e-6, False),
    "lin": (lambda p: adapter.make(p, 3, kind="lin", key=KEY), 2e-6, False),
    "lora and norms": (
        lambda p: together(p, lambda p: jlora.lorafy(p, 2, key=KEY, layouts=stacks(p)), bitfit.norms),
        2e-6,
        True,
    ),
    "lora twice": (lambda p: together(p, *[lambda p: jlora.lorafy(p, 2, key=KEY, layouts=stacks(p))] * 2), 2e-6, True),
    "lora and adapters": (
        lambda p: together(
            p,
            lambda p: jlora.lorafy(
                p, 2, key=KEY, layouts=stacks(p), targets=r"q_proj|query|o_proj|attention/output/dense/kernel"
            ),
            lambda p: adapter.make(p, 3, kind="pfeiffer", key=KEY),
        ),
        2e-6,
        False,
    ),
    "parallel": (lambda p: adapter.make(p, 3, kind="parallel", scaling=4.0, key=KEY), 2e-6, False),
}


def in_codes(model, scheme):
    """The model with its matrices quantised: the methods must not see that."""

    def made(scan):
        apply, params = model(scan)
        return apply, jlora.quantise(params, scheme, layouts=stacks(params))

    return made


MODELS = {"encoder": encoder, "llama": llama}
QUANTISED = {"encoder, nf4": in_codes(encoder, "nf4")}
CASES = [
    pytest.param(method, model, scan, id=f"{method}-{model}-{'scan' if scan else 'loop'}")
    for method in METHODS
    for model in MODELS
    for scan in (True, False)
    if (method, model) not in {("bitfit", "llama")}
    # these attach the leaf that "lora" does
    and (method not in {"adalora", "eva", "vera, of the docs"} or (model == "encoder") == scan)
]
CASES += [pytest.param(method, "encoder, nf4", True, id=f"{method}-nf4") for method in ("lora", "dora", "ia3")]


def close(got, want, tol):
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * float(jnp.abs(want).max()))


@pytest.mark.parametrize("method, model, scan", CASES)
def test_properties(method, model, scan):
    make, start_tol, merges = METHODS[method]
    apply, params = (MODELS | QUANTISED)[model](scan)
    plain = jlora.dequantise(params)
    frozen, trained = make(params)
    lifted = jax.jit(jlora.lift(apply, strict=True))
    compiled = []

    def loss(trained, frozen):
        compiled.append(1)
        return jnp.sum(jlora.lift(apply, strict=True)(jlora.combine(frozen, trained), TOKENS) ** 2)

    base = jax.jit(apply)(plain, TOKENS)
    close(lifted(jlora.combine(frozen, trained), TOKENS), base, start_tol)

    # what trains has gradients, in its own shape; nothing trains twice and some of it moves the loss
    grad_of = jax.jit(jax.grad(loss))
    grads = grad_of(trained, frozen)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))
    assert any(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))
    tx = optax.adam(0.1)
    state = tx.init(trained)
    assert size(state[0].mu) == size(trained)
    before = jax.tree.map(lambda x: np.array(x), frozen)
    updates, state = tx.update(grads, state)
    trained = optax.apply_updates(trained, updates)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    grad_of(trained, frozen)
    assert len(compiled) == 1, "compiled again for the second step"

    moved = jitter(trained, 0.1)
    tuned = lifted(jlora.combine(frozen, moved), TOKENS)
    assert jnp.abs(tuned - base).max() > 1e-2
    if merges:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if model in QUANTISED else "error", MergedAsFloats)
            merged = jlora.merge(frozen, moved)
        assert jax.tree.structure(merged) == jax.tree.structure(plain)
        jax.tree.map(lambda m, p: np.testing.assert_equal((m.shape, m.dtype), (p.shape, p.dtype)), merged, plain)
        close(jax.jit(apply)(merged, TOKENS), tuned, 2e-5)
    table = jlora.summary(frozen, moved)
    assert f"{size(trained):,} of" in table


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays(method):
    make, _, merges = METHODS[method]
    apply, params = encoder(True, jnp.bfloat16)
    frozen, trained = make(params)
    if merges:
        assert {x.dtype for x in jax.tree.leaves(jlora.merge(frozen, trained))} == {jnp.dtype(jnp.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = jlora.lift(apply)(jlora.combine(frozen, trained), TOKENS)
    assert out.dtype == apply(params, TOKENS).dtype


@pytest.mark.parametrize(
    ("layout", "use"),
    [("sio", lambda x, w: x @ w.transpose(1, 0, 2).reshape(8, 15)), ("iso", lambda x, w: x @ w.reshape(8, 15))],
)
def test_dora_through_a_reshape_that_its_factors_do_not_have(layout, use):
    shape = {"sio": (3, 8, 5), "iso": (8, 3, 5)}[layout]
    frozen, lora = dora.make({"w": jax.random.normal(KEY, shape)}, 2, key=KEY, layouts={"w": layout})
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # W + A·B is written out, and told
        got = jlora.lift(lambda p, x: use(x, p["w"]))(jlora.combine(frozen, lora), jnp.ones((2, 8)))
    np.testing.assert_allclose(got, use(jnp.ones((2, 8)), jlora.merge(frozen, lora)["w"]), rtol=1e-5, atol=1e-5)


def test_dora_starts_as_the_base_where_a_column_is_zero():
    params = {"w": jnp.ones((4, 3)).at[:, 1].set(0.0)}
    frozen, lora = dora.make(params, 2, layouts={"w": "io"})
    out = lambda lora: jlora.lift(lambda p: jnp.ones((2, 4)) @ p["w"])(jlora.combine(frozen, lora))
    np.testing.assert_allclose(out(lora), jnp.ones((2, 4)) @ params["w"], rtol=1e-6)
    grads = jax.grad(lambda lora: jnp.sum(out(lora) ** 2))(lora)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
