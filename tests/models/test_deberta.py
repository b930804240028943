"""DeBERTa v2 and v3 against transformers on random checkpoints: every switch, heads, padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load
from jlora.models.deberta import XXLARGE, Deberta, DebertaConfig, hf_tensors
from jlora.tree import paths, size

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_labels": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 40, "initializer_range": 0.2, "relative_attention": True}
V3 = {"position_buckets": 6, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
V3 |= {"pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
CASES = {
    "v3": (V3, "none"),
    "v3 classify": (V3, "classify"),
    "v3 mlm": (V3, "mlm"),
    "xxlarge's convolution": ({**V3, "conv_kernel_size": 3, "conv_act": "gelu"}, "classify"),
    "v3 mlm by relu": ({**V3, "hidden_act": "relu"}, "mlm"),
    "tanh pooled": ({**V3, "pooler_hidden_act": "tanh"}, "classify"),
    "own position kernels": ({"pos_att_type": ["c2p", "p2c"], "share_att_key": False, "type_vocab_size": 2}, "none"),
    "a third kind, of DeBERTa v1": ({**V3, "pos_att_type": ["c2p", "p2c", "p2p"]}, "none"),
    "c2p only, no buckets": ({**V3, "position_buckets": -1, "pos_att_type": ["c2p"]}, "none"),
}
KINDS = {"none": "Model", "classify": "ForSequenceClassification", "mlm": "ForMaskedLM"}
TOKENS = np.random.default_rng(0).integers(2, 61, (3, 21))
MASKS = {
    "whole": np.ones((3, 21), bool),
    "right": np.arange(21)[None] < np.array([[21], [4], [13]]),
    "left": np.arange(21)[None] >= np.array([[0], [4], [13]]),
}


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, scan, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options, head = CASES[case]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"DebertaV2{KINDS[head]}")(transformers.DebertaV2Config(**SIZES, **options)).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = load(str(tmp_path), scan_layers=scan, head=head)
    for side, mask in MASKS.items():
        if side == "left" and head == "classify":
            continue  # the pooler reads column 0, which is padding
        for rows in (slice(None), slice(0, 1)):
            with torch.no_grad():
                out = theirs(torch.tensor(TOKENS[rows]), attention_mask=torch.tensor(mask[rows]).long())
            want = out[0].numpy()
            tokens, real = jnp.asarray(TOKENS[rows]), jnp.asarray(mask[rows])
            got = np.asarray(ours.model.apply({"params": ours.params}, tokens, mask=real))
            if head != "classify":
                got, want = got[mask[rows]], want[mask[rows]]
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), side


def test_xxlarge_has_its_size_and_every_tensor_a_place():
    model = Deberta(XXLARGE, head="classify")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    assert abs(size(shapes) / 1.567e9 - 1) < 0.005
    assert {t.path for t in hf_tensors(XXLARGE, head="classify")} == set(paths(shapes))


def test_a_shared_projection_is_adapted_in_all_its_uses():
    config = DebertaConfig.from_hf({**SIZES, **V3})
    model = Deberta(config)
    tokens = jnp.asarray(TOKENS)
    params = model.init(jax.random.key(0), tokens)["params"]
    frozen, lora = jlora.lorafy(params, 2, targets=["query_proj", "value_proj"], layouts={"kernel": "sio"})
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    lora = jax.tree.unflatten(treedef, [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    apply = lambda p: model.apply({"params": p}, tokens)
    got = jlora.lift(apply, strict=True)(jlora.combine(frozen, lora))
    np.testing.assert_allclose(got, apply(jlora.merge(frozen, lora)), atol=1e-4)


def test_every_activation_that_is_taken_is_carried_out():
    config = DebertaConfig(61, 32, 48, 1, 4, hidden_act="relu", pooler_hidden_act="tanh")
    tokens = jnp.asarray(TOKENS)
    model = Deberta(config, head="pooled")
    params = model.init(jax.random.key(0), tokens)["params"]
    first = model.apply({"params": params}, tokens, method="hidden")[:, 0]
    want = jnp.tanh(first @ params["pooler"]["dense"]["kernel"])
    np.testing.assert_allclose(model.apply({"params": params}, tokens), want, atol=1e-5)
    model = Deberta(config, head="mlm")
    params = model.init(jax.random.key(0), tokens)["params"]
    x = model.apply({"params": params}, tokens, method="hidden") @ params["lm_head"]["dense"]["kernel"]
    x = jnp.maximum(x, 0)
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + config.layer_norm_eps)
    want = x @ params["embeddings"]["word_embeddings"]["embedding"].T
    np.testing.assert_allclose(model.apply({"params": params}, tokens), want, atol=1e-4)


def test_what_changes_results_is_refused():
    with pytest.raises(ValueError, match="relative_attention False is not supported"):
        DebertaConfig.from_hf({**SIZES, "relative_attention": False})
    with pytest.raises(ValueError, match="attention_head_size 16 is not supported: hidden_size / num_attention_heads"):
        DebertaConfig.from_hf({**SIZES, "attention_head_size": 16})
    for same in (None, 8):  # v2 xlarge's config says it, as hidden_size / num_attention_heads
        assert DebertaConfig.from_hf({**SIZES, "attention_head_size": same}) == DebertaConfig.from_hf(SIZES)
    for name in ("hidden_act", "conv_act", "pooler_hidden_act"):
        with pytest.raises(ValueError, match=f"{name} 'mish' is not supported: gelu, .*tanh are"):
            DebertaConfig.from_hf({**SIZES, name: "mish"})
        assert getattr(DebertaConfig.from_hf({**SIZES, name: "tanh"}), name) == "tanh"
