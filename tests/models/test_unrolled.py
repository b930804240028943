"""A stack of layers taken apart: the same answers, whatever was trained on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.generate import GenerateConfig, forward, generate
from jlora.methods import adapter, bitfit, dora, prefix, prefix_kv
from jlora.methods.columns import reading
from jlora.models.gemma import Gemma, GemmaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.unrolled import unrolled

TOKENS = np.arange(10).reshape(2, 5) % 7
MODELS = {
    "llama": Llama(LlamaConfig(31, 16, 24, 3, 4, 2, 4)),
    "gpt2": GPT2(GPT2Config(31, 32, 8, 3, 2)),
    "gemma": Gemma(GemmaConfig(31, 16, 24, 3, 4, 2, 4, 4.0, 4, (True, False, True))),
}


def start(model):
    params = model.init(jax.random.key(0), TOKENS)["params"]
    layouts = jlora.layouts(lambda p: model.apply({"params": p}, TOKENS), params)
    return params, layouts


def moved(tree):
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return form.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def read(model, params):
    """Logits after the tokens, and after one more that is read from the cache."""
    mask = jnp.ones(TOKENS.shape, bool)
    one, cache = forward(model, params, TOKENS, mask, model.init_cache(2, 6))
    return jnp.stack([one, forward(model, params, TOKENS[:, :1], mask[:, :1], cache)[0]])


METHODS = {
    "lora": lambda p, layouts: jlora.lorafy(p, 2, layouts=layouts),
    "dora": lambda p, layouts: dora.make(p, 2, layouts=layouts),
    "bitfit": lambda p, layouts: bitfit.make(p, layouts=layouts) if "h" in p else bitfit.norms(p),
    "adapter": lambda p, layouts: adapter.make(p, 2, layouts=layouts),
    "adapter of the last layers": lambda p, layouts: adapter.make(p, 2, drop=1, layouts=layouts),
    "prefix": lambda p, layouts: prefix.layer(p, 2, layouts=layouts),
    "prefix_kv": lambda p, layouts: prefix_kv.make(p, 2, layouts=layouts),
}


CASES = [("llama", method) for method in METHODS] + [(n, m) for n in ("gpt2", "gemma") for m in ("lora", "prefix_kv")]


@pytest.mark.parametrize("name, method", CASES)
def test_the_same_is_read(name, method):
    model = MODELS[name]
    params, layouts = start(model)
    frozen, trained = METHODS[method](params, layouts)
    trained = moved(trained)
    stacked = reading(model, frozen, trained), jlora.combine(frozen, trained)
    apart = unrolled(*stacked)
    assert {"layers_2", "h_2"} & {*apart[1]} and not {"layers", "h"} & {*apart[1]}
    want = read(*stacked)
    np.testing.assert_allclose(read(*apart), want, atol=1e-5)
    assert jnp.abs(want - read(model, params)).max() > 1e-2  # what was trained is heard


def test_beams_are_the_same():
    model = MODELS["llama"]
    params, layouts = start(model)
    frozen, lora = METHODS["lora"](params, layouts)
    stacked, config = (model, jlora.combine(frozen, moved(lora))), GenerateConfig(max_new_tokens=8, beams=3)
    want, got = (generate(*one, TOKENS, np.ones(TOKENS.shape, bool), config) for one in (stacked, unrolled(*stacked)))
    assert got == want


def test_what_has_no_stack_is_given_back():
    model = Llama(LlamaConfig(31, 16, 24, 3, 4, 2, 4), scan_layers=False)
    params, _ = start(model)
    assert unrolled(model, params) == (model, params)
