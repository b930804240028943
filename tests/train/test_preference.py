"""DPO and ORPO against their papers' formulas in plain numbers; the reference is the base itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.commands.settings import TrainConfig
from jlora.commands.tasks import Pairs
from jlora.data import Example
from jlora.methods import named
from jlora.methods.columns import reading
from jlora.models.llama import Llama, LlamaConfig
from jlora.train import init_state, make_train_step
from jlora.train.loss import example_sums
from jlora.train.preference import PairSource, dpo, orpo, preference_sums

MODEL = Llama(LlamaConfig(31, 32, 48, 2, 4, 2, 8))
PARAMS = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
RNG = np.random.default_rng(0)
LAYOUTS = {"kernel": "sio"}


def example(n, answer):
    return Example(RNG.integers(1, 31, n).astype(np.int32), np.arange(n) >= n - answer)


PAIRS = [(example(6, 2), example(9, 4)), (example(7, 3), example(5, 1)), (example(8, 3), example(8, 2))]
BATCH = PairSource(PAIRS, 4, [16])[0]
FROZEN, LORA = jlora.lorafy(PARAMS, 4, layouts=LAYOUTS, targets=["q_proj", "v_proj"])
OTHER = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), LORA)


def logp(params, one):
    logits = MODEL.apply({"params": params}, one.tokens[None])[0]
    at = np.flatnonzero(one.loss_mask[1:])
    return float(sum(jax.nn.log_softmax(logits)[n, one.tokens[n + 1]] for n in at)), len(at)


def test_dpo_is_the_formula_and_its_reference_the_base():
    merged = jlora.merge(FROZEN, OTHER)
    want = 0.0
    for chosen, rejected in PAIRS:
        margin = logp(merged, chosen)[0] - logp(PARAMS, chosen)[0] - logp(merged, rejected)[0]
        want += math.log1p(math.exp(-0.5 * (margin + logp(PARAMS, rejected)[0])))
    got = preference_sums(MODEL, "dpo", 0.5)(OTHER, FROZEN, BATCH, None)
    assert float(got.examples) == 3
    np.testing.assert_allclose(got.loss, want, rtol=1e-4)
    start = preference_sums(MODEL, "dpo", 0.5)(LORA, FROZEN, BATCH, None)
    np.testing.assert_allclose(start.loss, 3 * math.log(2), rtol=1e-6)


PREFIXES, WHOLE, CHANGED = {"prompt", "p-tuning", "prefix", "prefix-kv"}, {"full", "norms"}, {"pissa", "olora"}
METHODS = [name for name in named.METHODS if name not in CHANGED | {"bitfit"}]  # a Llama has no bias


@pytest.mark.parametrize("method", [*METHODS, "lora+prompt", "lora+norms"])
def test_dpo_starts_at_log_2_or_refuses(method):
    settings = named.MethodConfig(method, rank=2, targets=("attention",), width=2, virtual_tokens=3, dimension=40)
    frozen, trained = named.make(PARAMS, settings, layouts=LAYOUTS)
    sums = lambda: preference_sums(reading(MODEL, frozen, trained), "dpo")
    for kind, text in ((PREFIXES, "and a prefix does not"), (WHOLE, "train no weight whole")):
        if kind & {*method.split("+")}:
            with pytest.raises(ValueError, match=text):
                sums()(trained, frozen, BATCH, None)
            return
    np.testing.assert_allclose(jax.jit(sums())(trained, frozen, BATCH, None).loss, 3 * math.log(2), rtol=1e-5)


@pytest.mark.parametrize("method", ["lora+norms", "prefix-kv"])
def test_dpo_goes_on_from_an_adapter_which_is_its_reference(method):
    """The loss is log 2 at that adapter, whatever it is, and the formula's against it elsewhere."""
    settings = named.MethodConfig(method, rank=2, targets=("attention",), virtual_tokens=3)
    frozen, trained = named.make(PARAMS, settings, layouts=LAYOUTS)
    move = lambda x, key: x + 0.3 * jax.random.normal(jax.random.key(key + x.size), x.shape)
    start, now = (jax.tree.map(lambda x, key=key: move(x, key), trained) for key in (1, 2))
    model = reading(MODEL, frozen, trained)
    sums = preference_sums(model, "dpo", 0.5, started=True)
    step = jax.jit(jax.value_and_grad(lambda t: sums(t, (frozen, start), BATCH, None).loss))
    loss, grads = step(start)
    np.testing.assert_allclose(loss, 3 * math.log(2), rtol=1e-5)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-3
    each = jax.jit(lambda t: jlora.lift(example_sums(model))(jlora.combine(frozen, t), BATCH).loss)
    logps = [-each(t)[:6] for t in (now, start)]
    margin = np.subtract(*(x[::2] - x[1::2] for x in map(np.asarray, logps)))
    want = np.log1p(np.exp(-0.5 * margin)).sum()
    np.testing.assert_allclose(step(now)[0], want, rtol=1e-4)


@pytest.mark.parametrize("how", [{"method": "olora"}, {"method": "lora+norms", "init": "pissa"}])
def test_dpo_refuses_what_changes_the_base(how):
    with pytest.raises(ValueError, match=r"(olora|pissa) changes it: use init kaiming, or loss orpo"):
        Pairs(TrainConfig("m", "d", loss="dpo", **how))
    Pairs(TrainConfig("m", "d", loss="orpo", **how))


def test_orpo_is_the_formula():
    merged, want = jlora.merge(FROZEN, OTHER), 0.0
    for pair in PAIRS:
        a, b = (total / count for total, count in (logp(merged, one) for one in pair))
        ratio = math.log(math.exp(a) / (1 - math.exp(a))) - math.log(math.exp(b) / (1 - math.exp(b)))
        want += -a + 0.2 * math.log1p(math.exp(-ratio))
    got = preference_sums(MODEL, "orpo", 0.2)(OTHER, FROZEN, BATCH, None)
    np.testing.assert_allclose(got.loss, want, rtol=1e-4)


def test_numbers():
    loss, margin = dpo(*map(jnp.float32, (-1.0, -3.0, -2.0, -2.5)), 0.1)
    assert float(margin) == 1.5 and float(loss) == pytest.approx(math.log1p(math.exp(-0.15)))
    assert float(orpo(jnp.float32(-1e-9), jnp.float32(-1.0), 1.0)[0]) < 1e-3


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_training_makes_the_chosen_lead(kind):
    tx = optax.adam(3e-3)
    sums = preference_sums(MODEL, kind)
    state, step = init_state(LORA, tx), make_train_step(sums, tx)
    for _ in range(40):
        state, _ = step(state, FROZEN, BATCH)
    after = sums(state.trained, FROZEN, BATCH, None)
    assert float(after.right) == 3 and float(after.loss) < float(sums(LORA, FROZEN, BATCH, None).loss)
    with pytest.raises(ValueError, match="'ppo' is not known"):
        preference_sums(MODEL, "ppo")


def test_dpo_holds_no_second_model():
    from jlora.tree import nbytes

    model = Llama(LlamaConfig(31, 256, 1024, 2, 4, 2, 64))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    frozen, lora = jax.eval_shape(lambda p: jlora.lorafy(p, 4, layouts=LAYOUTS, targets=["q_proj"]), params)
    tx = optax.sgd(0.1)
    state = jax.eval_shape(lambda t: init_state(t, tx), lora)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
    compiled = {
        kind: make_train_step(preference_sums(model, kind), tx).lower(state, frozen, batch).compile().memory_analysis()
        for kind in ("dpo", "orpo")  # orpo has no reference
    }
    assert compiled["dpo"].argument_size_in_bytes == compiled["orpo"].argument_size_in_bytes < 1.05 * nbytes(params)
    more = compiled["dpo"].temp_size_in_bytes - compiled["orpo"].temp_size_in_bytes
    assert more < 0.25 * nbytes(params)
