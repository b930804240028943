"""`audit` passes an honest step and fails each way of breaking a promise; `summary` counts."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora.audit import in_program

D, F, TOKENS = 24, 40, 56


def model(p, x):
    def layer(c, w):
        return c + jnp.tanh(jax.nn.gelu(c @ w["up"]) @ w["down"]) * w["scale"], None

    return jax.lax.scan(layer, x, p["layers"])[0] @ p["out"]


def setting():
    k = jax.random.split(jax.random.key(0), 3)
    layers = {
        "up": jax.random.normal(k[0], (3, D, F)) / 5,
        "down": jax.random.normal(k[1], (3, F, D)) / 6,
        "scale": jnp.ones((3, D)),
    }
    params = {"layers": layers, "out": jax.random.normal(k[2], (D, 33))}
    x = jax.random.normal(k[0], (TOKENS, D))
    return params, x, jlora.layouts(model, params, x)


def stepper(loss, tx):
    def step(trained, state, frozen, x):
        value, grads = jax.value_and_grad(loss)(trained, frozen, x)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step


def honest(lora, frozen, x):
    return jnp.mean(jlora.lift(model, strict=True)(jlora.combine(frozen, lora), x) ** 2)


def merged(lora, frozen, x):
    return jnp.mean(model(jlora.merge(frozen, lora), x) ** 2)


@pytest.mark.parametrize("codes", [False, True])
def test_an_honest_step_passes(codes):
    params, x, layouts = setting()
    params = jlora.quantise(params, "int4", layouts=layouts) if codes else params
    frozen, lora = jlora.lorafy(params, 2, layouts=layouts)
    tx = optax.adam(1e-3)
    report = jlora.audit(
        stepper(honest, tx), lora, tx.init(lora), frozen, x, frozen=frozen, lora=lora, opt_state=tx.init(lora)
    )
    assert report.ok, str(report)
    assert report.bytes["optimiser state"] == 2 * report.bytes["trained"] + 4
    assert "no gradient" in str(report)


def test_a_materialised_weight_is_found():
    params, x, layouts = setting()
    frozen, lora = jlora.lorafy(params, 2, layouts=layouts)
    tx = optax.adam(1e-3)
    report = jlora.audit(stepper(merged, tx), lora, tx.init(lora), frozen, x, frozen=frozen, lora=lora)
    assert not report.ok and "layers/up" in str(report)


def test_a_frozen_gradient_and_its_state_are_found():
    params, x, layouts = setting()
    frozen, lora = jlora.lorafy(params, 2, layouts=layouts)
    tx = optax.adam(1e-3)
    both = (lora, frozen)
    step = stepper(lambda both, _, x: honest(*both, x), tx)
    report = jlora.audit(step, both, tx.init(both), (), x, frozen=frozen, lora=lora, opt_state=tx.init(both))
    assert any("summed over 56 elements" in problem for problem in report.problems), str(report)
    assert any("the optimiser keeps" in problem for problem in report.problems), str(report)


def test_a_frozen_weight_of_a_factors_shape_is_no_false_alarm():
    """A router of as many experts as the rank: the gradient that A is promised has its shape."""
    params = {"up": jax.random.normal(jax.random.key(0), (D, F)) / 5, "router": jnp.ones((D, 8))}

    def loss(lora, frozen, x):
        f = lambda p, x: jnp.tanh(x @ p["up"]).sum(1) * jax.nn.softmax(x @ p["router"]).max(1)
        return jnp.mean(jlora.lift(f)(jlora.combine(frozen, lora), x))

    frozen, lora = jlora.lorafy(params, 8, targets="up")
    x = jnp.ones((TOKENS, D))
    report = jlora.audit(jax.grad(loss), lora, frozen, x, frozen=frozen, lora=lora)
    assert report.ok and report.unseen == ("router",), str(report)
    assert "not looked at, being of a trained leaf's shape: router" in str(report)
    report = jlora.audit(jax.grad(loss, argnums=(0, 1)), lora, frozen, x, frozen=frozen, lora=lora)
    assert any("of the shape of up" in problem for problem in report.problems)  # the others are seen still


def test_a_frozen_weight_copied_in_a_loop_is_named():
    frozen = {"w": jnp.zeros((3, 520, 512)), "head": jnp.zeros((600, 512))}

    def step(w, x, turned):
        def layer(c, w):
            if turned:  # a barrier: the transposed weight itself, and not a product that reads it so
                w = jax.lax.optimization_barrier(w.T).T
            return jnp.tanh(c @ w) @ w.T, None

        return jax.lax.scan(layer, x, w)[0]

    def seen(turned):
        args = (frozen["w"], jnp.ones((7, 520)))
        return jlora.audit(lambda w, x: step(w, x, turned), *args, frozen=frozen, lora={}).copies

    assert seen(True) and all("of w [5" in copy for copy in seen(True))
    assert seen(False) == ()


def test_summary_counts():
    params, _, layouts = setting()
    frozen, lora = jlora.lorafy(params, 2, layouts=layouts, train="scale", targets="all-linear")
    text = jlora.summary(frozen, lora)
    trained = 3 * 2 * (D + F) * 2 + 3 * D + 2 * (D + 33)
    assert f"{trained:,} of {jlora.tree.size(params):,} trained" in text
    assert "whole" in text and "axes sio" in text
    assert frozen["layers"]["scale"] is None


@pytest.mark.parametrize(
    "given, text",
    [
        ({"targets": "upp"}, "near: up"),
        ({"targets": "scale"}, "matches no matrix"),
        ({"rank": 0}, "rank"),
        ({"init": "kaimin"}, "not known"),
        ({"layouts": {"up": "io"}, "targets": "up"}, "one letter an axis"),
        ({"layouts": None}, "jlora.layouts"),
        ({"targets": "up", "exclude": "layers"}, "nothing is left"),
        ({"init": "pissa", "rank": 30, "targets": "up"}, "needs at most 24"),
    ],
)
def test_bad_arguments_say_what_would_fix_them(given, text):
    params, _, layouts = setting()
    with pytest.raises(ValueError, match=text):
        jlora.lorafy(params, **{"rank": 2, "layouts": layouts, **given})


GPU = """
  %cublas-gemm.1 = (f32[24,40]{1,0}, s8[4194304]{0}) custom-call(f32[24,56]{1,0} %x, f32[56,40]{1,0} %ct), custom_call_target="__cublas$gemm"
  %ours.1 = f32[56,40]{1,0} custom-call(f32[56,24]{1,0} %x, f32[24,40]{1,0} %w), custom_call_target="__cublas$lt$matmul"
  %other.1 = (f32[24,40]{1,0}, s8[16]{0}) custom-call(f32[24,40]{1,0} %w), custom_call_target="__cub$DeviceRadixSort"
"""  # noqa: E501


TPU = """
  %dot.1 = f32[24,40]{1,0:T(8,128)} dot(f32[24,56]{1,0:T(8,128)} %x, f32[56,40]{1,0:T(8,128)} %ct)
  ROOT %convolution.2 = bf16[40,24]{1,0:T(8,128)(2,1)S(1)} convolution(bf16[40,56]{1,0} %ct, bf16[56,24]{1,0} %x)
  %other.3 = (f32[24,40]{1,0:T(8,128)}, s32[]{:T(128)}) sort(f32[24,40]{1,0:T(8,128)} %w)
"""


def test_products_of_a_program_for_tpus_are_seen():
    first, second = in_program(TPU, {"w": jnp.ones((24, 40))})
    assert "[24, 40]" in first and "[40, 24]" in second


def test_a_library_call_of_a_program_for_gpus_is_a_product():
    (problem,) = in_program(GPU, {"w": jnp.ones((24, 40))})
    assert problem.startswith("a product of the shape of w [24, 40]: its gradient")
