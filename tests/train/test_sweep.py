"""Adapters trained together against each trained alone; and what the program holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.data import BatchSource, Example
from jlora.models.llama import Llama, LlamaConfig
from jlora.train import OptimiserConfig, answer_sums, init_state, make_optimiser, make_train_step
from jlora.train.sweep import SweepSource, init_sweep, make_sweep_step, stack

MODEL = Llama(LlamaConfig(31, 32, 48, 2, 4, 2, 8))
PARAMS = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
LAYOUTS = {"kernel": "sio"}
RANKS, ALPHAS, RATES, SEEDS = (2, 4, 4, 3), (4.0, 4.0, 8.0, 3.0), (1e-2, 3e-3, 1e-2, 2e-2), (0, 1, 2, 0)
LIFTED = jlora.lift(answer_sums(MODEL))
sums = lambda trained, frozen, batch, key: LIFTED(jlora.combine(frozen, trained), batch)


def examples(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, 16, 20)
    return [Example(rng.integers(1, 31, n).astype(np.int32), np.arange(n) >= n - rng.integers(1, 4)) for n in sizes]


def made(n, params=PARAMS):
    key = jax.random.key(SEEDS[n])
    return jlora.lorafy(params, RANKS[n], alpha=ALPHAS[n], key=key, layouts=LAYOUTS, targets=["q_proj", "down_proj"])


def source(n):  # the last two are of another data set
    return BatchSource(examples(n // 2), 4, [8, 16], seed=SEEDS[n], steps=5)


@pytest.mark.parametrize("at_once", [0, 2])
def test_together_is_each_alone(at_once):
    tx = make_optimiser(OptimiserConfig(1.0, weight_decay=0.1), 5)
    frozen, stacked = PARAMS, stack([made(n)[1] for n in range(4)])
    step = make_sweep_step(sums, tx, stacked, rates=RATES, seeds=SEEDS, at_once=at_once)
    state, batches, losses = init_sweep(stacked, tx), SweepSource([source(n) for n in range(4)]), []
    for batch in batches.iterator():
        state, (found, _) = step(state, frozen, batch)
        losses.append(found.loss / found.tokens)
    for n in range(4):
        _, lora = made(n)
        own = make_optimiser(OptimiserConfig(RATES[n], weight_decay=0.1), 5)
        alone, step_alone = init_state(lora, own), make_train_step(sums, own, seed=SEEDS[n])
        for k, batch in enumerate(source(n).iterator()):
            alone, (found, _) = step_alone(alone, frozen, batch)
            assert float(found.loss / found.tokens) == pytest.approx(float(losses[k][n]), rel=1e-5)
        got = stacked.unstack(state.trained, n)
        assert jax.tree.structure(got) == jax.tree.structure(alone.trained)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, alone.trained)
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, lora)
        assert min(jax.tree.leaves(moved)) > 1e-3


def test_the_base_is_held_once():
    model = Llama(LlamaConfig(31, 256, 1024, 2, 4, 2, 64))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    lifted = jlora.lift(answer_sums(model))
    loss = lambda trained, frozen, batch, key: lifted(jlora.combine(frozen, trained), batch)
    tx = make_optimiser(OptimiserConfig(1.0), 5)
    shape = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def held(step, state, batch):
        memory = step.lower(state, params, shape(batch)).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes  # the state's output is its donated input

    lora = lambda n: jax.eval_shape(lambda p: made(n, p)[1], params)
    alone = held(make_train_step(loss, tx), jax.eval_shape(lambda t: init_state(t, tx), lora(1)), source(0)[0])
    zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), lora(n)) for n in range(4)]
    stacked = stack(zeros)
    step = make_sweep_step(loss, tx, stacked, rates=RATES, seeds=SEEDS)
    together = held(step, jax.eval_shape(lambda: init_sweep(stacked, tx)), SweepSource([source(0)] * 4)[0])
    assert together < 0.6 * 4 * alone


def test_what_cannot_be_stacked():
    one = made(0)[1]
    _, other = jlora.lorafy(PARAMS, 2, layouts=LAYOUTS, targets=["q_proj"])
    with pytest.raises(ValueError, match="the same weights"):
        stack([one, other])
