"""The stack of layers that all models share: what is kept of a layer for its gradient."""

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
