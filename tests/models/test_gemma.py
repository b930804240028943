"""Gemma 3 against transformers: local and global layers, long rope, padding, generation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generate import GenerateConfig, generate, pad_left
from jlora.io import load
from jlora.models.gemma import GemmaConfig

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "sliding_window": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24}
TOKENS = np.random.default_rng(0).integers(3, 61, (3, 12))
MASKS = {
    "whole": np.ones((3, 12), bool),
    "right": np.arange(12)[None] < np.array([[12], [5], [9]]),
    "left": np.arange(12)[None] >= np.array([[0], [5], [9]]),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    }
    config = transformers.Gemma3TextConfig(**SIZES, layer_types=kinds, rope_parameters=rope, initializer_range=0.2)
    theirs = transformers.Gemma3ForCausalLM(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("gemma")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("side", MASKS)
def test_parity(pair, scan, side):
    import torch

    theirs, folder = pair
    ours, mask = load(str(folder), scan_layers=scan), MASKS[side]
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    options = {"attention_mask": torch.tensor(mask).long(), "position_ids": torch.tensor(positions)}
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS), **options).logits.numpy()[mask]
    got = ours.model.apply({"params": ours.params}, jnp.asarray(TOKENS), mask=jnp.asarray(mask))
    assert np.abs(np.asarray(got)[mask] - want).max() <= 1e-4 * np.abs(want).max()


def test_it_generates_as_transformers_does(pair):
    import torch

    theirs, folder = pair
    ours, prompts = load(str(folder)), [[5, 6, 7], [3, 9, 11, 4, 8, 2, 44]]
    got = generate(ours.model, ours.params, *pad_left(prompts, 8), GenerateConfig(max_new_tokens=12, end=(1,)))
    with torch.no_grad():
        want = [
            theirs.generate(torch.tensor([p]), do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0)
            for p in prompts
        ]
    assert got == [w[0, len(p) :].tolist() for w, p in zip(want, prompts, strict=True)]


def test_old_and_new_configs_and_refusals():
    new = GemmaConfig.from_hf({**SIZES, "num_hidden_layers": 7})
    assert new.local == (True,) * 5 + (False, True) and new.rope_local_base_freq == 1e4
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        GemmaConfig.from_hf({**SIZES, "final_logit_softcapping": 30.0})
    yarn = {"sliding_attention": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="yarn"):
        GemmaConfig.from_hf({**SIZES, "rope_parameters": yarn})
    for kinds in (["full_attention"] * 3, ["chunked_attention"] * 4):
        with pytest.raises(ValueError, match="layer_types of 4 layers"):
            GemmaConfig.from_hf({**SIZES, "layer_types": kinds})
