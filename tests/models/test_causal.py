"""The stack of layers that all models share: what is kept of a layer for its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.bert import Bert, BertConfig
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.models.gemma import Gemma, GemmaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig

MODELS = {
    "llama": (Llama, LlamaConfig(31, 16, 24, 2, 4, 2, 4)),
    "gpt2": (GPT2, GPT2Config(31, 16, 8, 2, 2)),
    "gemma": (Gemma, GemmaConfig(31, 16, 24, 2, 4, 2, 4, 4.0, 4, (True, False))),
    "bert": (Bert, BertConfig(31, 16, 24, 2, 4)),
    "deberta": (Deberta, DebertaConfig(31, 16, 24, 2, 4, conv_kernel_size=3)),
}
TOKENS = jnp.arange(8).reshape(1, 8)


def gradient(kind, config, params, **options):
    """The gradient of some function of the model's outputs."""
    model = kind(config, **options)
    return jax.grad(lambda p: jnp.mean(model.apply({"params": p}, TOKENS) ** 2))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
def test_what_a_layer_keeps(name, scan):
    kind, config = MODELS[name]
    params = kind(config, scan_layers=scan).init(jax.random.key(0), TOKENS)["params"]
    of = {remat: gradient(kind, config, params, scan_layers=scan, remat=remat) for remat in (False, True, "offload")}
    texts = {remat: str(jax.make_jaxpr(f)(params)) for remat, f in of.items()}
    products = {remat: text.count("dot_general") for remat, text in texts.items()}
    assert products[True] > products[False]  # some again, for the gradient
    assert {remat for remat, text in texts.items() if "device_put" in text} == {"offload"}
    if scan:
        got, want = (jax.jit(of[remat])(params) for remat in ("offload", False))
        close = lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max() + 1))
        jax.tree.map(close, got, want)


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_remat_is_refused(name):
    kind, config = MODELS[name]
    for remat in ("full", "offloaded"):
        with pytest.raises(ValueError, match=f"remat '{remat}' is not known: False, True, 'dots' or 'offload'"):
            kind(config, remat=remat).init(jax.random.key(0), TOKENS)


DECODERS = {
    "llama": MODELS["llama"],
    "a window": (Llama, LlamaConfig(31, 16, 24, 2, 4, 2, 4, sliding_window=3)),
    "gpt2": MODELS["gpt2"],
    "gemma": MODELS["gemma"],
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
def test_token_by_token_is_as_at_once(name, scan):
    kind, config = DECODERS[name]
    model = kind(config, scan_layers=scan)
    mask = jnp.ones((2, 8), bool).at[1, :3].set(False)
    tokens = jnp.concatenate([TOKENS, TOKENS[:, ::-1]])
    params = model.init(jax.random.key(0), tokens)["params"]
    want = model.apply({"params": params}, tokens, mask=mask)
    cache, step = model.init_cache(2, 10), jax.jit(lambda p, *rest, **kw: model.apply({"params": p}, *rest, **kw))
    for first, last in [(0, 4), *((n, n + 1) for n in range(4, 8))]:
        got, cache = step(params, tokens[:, first:last], mask=mask[:, first:last], cache=cache)
        real = mask[:, first:last, None]
        np.testing.assert_allclose(jnp.where(real, got, 0), jnp.where(real, want[:, first:last], 0), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_a_step_copies_no_cache(name):
    kind, config = MODELS[name]
    config = dataclasses.replace(config, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 8})
    config = dataclasses.replace(config, local=(True, False) * 4) if name == "gemma" else config
    model, size = kind(config), 1024
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)["params"])
    cache = jax.eval_shape(lambda: model.init_cache(4, size))
    read = lambda p, tokens, cache: model.apply({"params": p}, tokens, cache=cache, method="hidden")
    step = jax.jit(read, donate_argnums=2).lower(params, jnp.zeros((4, 1), jnp.int32), cache).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache["kv"]))
    assert step.memory_analysis().temp_size_in_bytes < held / 2  # a layer's share, which a CPU copies, is an eighth


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_a_decoder_that_sees_what_follows_is_refused(name):
    config = MODELS[name][1]
    hub = dataclasses.asdict(config)
    type(config).from_hf({**hub, "is_causal": True})
    for wrong in (False, None):  # transformers takes null for no
        with pytest.raises(ValueError, match=f"is_causal {wrong} is not supported in a decoder: True is"):
            type(config).from_hf({**hub, "is_causal": wrong})


@pytest.mark.parametrize(
    "name, no, yes",
    [
        ("bert", "is_decoder", "position_embedding_type"),
        ("deberta", "talking_head", "legacy"),
        ("gemma", "attn_logit_softcapping", "tie_word_embeddings"),
        ("gpt2", "add_cross_attention", "scale_attn_weights"),
    ],
)
def test_null_in_a_config_is_no_and_nothing_else(name, no, yes):
    config = MODELS[name][1]
    hub = dataclasses.asdict(config)
    assert type(config).from_hf({**hub, no: None}) == type(config).from_hf(hub)
    with pytest.raises(ValueError, match=f"{yes} None is not supported in"):
        type(config).from_hf({**hub, yes: None})
