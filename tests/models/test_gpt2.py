"""GPT-2 against transformers; the sizes of GPT-3 from shapes alone."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.commands.written import prompts_of
from jlora.generate import GenerateConfig, generate, pad_left
from jlora.io import load
from jlora.methods.columns import Prefixed
from jlora.models.gpt2 import GPT2, GPT3, GPT2Config, hf_tensors
from jlora.tree import paths, size
from tests.data.test_batches import CharTokenizer

SIZES = {"vocab_size": 61, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
TOKENS = np.random.default_rng(0).integers(1, 61, (3, 9))
MASKS = {
    "whole": np.ones((3, 9), bool),
    "right": np.arange(9)[None] < np.array([[9], [4], [6]]),
    "left": np.arange(9)[None] >= np.array([[0], [4], [6]]),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("side", MASKS)
def test_parity(pair, scan, side):
    import torch

    theirs, folder = pair
    ours, mask = load(str(folder), scan_layers=scan), MASKS[side]
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    for rows in (slice(None), slice(0, 1)):
        options = {"attention_mask": torch.tensor(mask[rows]).long(), "position_ids": torch.tensor(positions[rows])}
        with torch.no_grad():
            want = theirs(torch.tensor(TOKENS[rows]), **options).logits.numpy()[mask[rows]]
        got = ours.model.apply({"params": ours.params}, jnp.asarray(TOKENS[rows]), mask=jnp.asarray(mask[rows]))
        assert np.abs(np.asarray(got)[mask[rows]] - want).max() <= 1e-4 * np.abs(want).max()


def test_packed_examples_do_not_see_each_other(pair):
    ours = load(str(pair[1]))
    a, b = TOKENS[0, :4], TOKENS[1, :5]
    apply = lambda *x, **options: ours.model.apply({"params": ours.params}, *x, **options)
    packed = {"segment_ids": jnp.array([[1] * 4 + [2] * 5]), "positions": jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    got = apply(jnp.concatenate([a, b])[None], **packed)[0]
    np.testing.assert_allclose(got, jnp.concatenate([apply(a[None])[0], apply(b[None])[0]]), atol=1e-4)


def test_it_generates_as_transformers_does(pair):
    import torch

    theirs, folder = pair
    ours, prompts = load(str(folder)), [[5, 6, 7], [3, 9, 11, 4]]
    got = generate(ours.model, ours.params, *pad_left(prompts, 4), GenerateConfig(max_new_tokens=12, end=(0,)))
    want = [
        theirs.generate(torch.tensor([p]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert got == want


def test_its_fused_projection_is_adapted_factored(pair):
    ours = load(str(pair[1]))
    apply = lambda p: ours.model.apply({"params": p}, jnp.asarray(TOKENS))
    found = jlora.layouts(apply, ours.params)
    assert found["wte/embedding"].tied and found["h/attn/c_attn/kernel"].letters == "sio"
    frozen, lora = jlora.lorafy(ours.params, 2, layouts=found)
    jlora.lift(apply, strict=True)(jlora.combine(frozen, lora))
    assert {path.split("/lora")[0] for path in paths(lora)} == {
        f"h/{name}/kernel" for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    }


@pytest.mark.parametrize(
    "name, billions", [("125m", 0.125), ("1.3b", 1.3), ("6.7b", 6.7), ("13b", 13.0), ("175b", 175)]
)
def test_gpt3_has_its_size(name, billions):
    model = GPT2(GPT3[name])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    assert abs(size(shapes) / 1e9 / billions - 1) < 0.03
    assert {t.path for t in hf_tensors(GPT3[name])} == set(paths(shapes))


def test_what_changes_results_is_refused():
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx True is not supported"):
        GPT2Config.from_hf({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True})


def test_more_tokens_than_positions_are_refused():
    config = GPT2Config(61, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    model = GPT2(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tokens, mask = pad_left([[5] * 30])
    (new,) = generate(model, params, tokens, mask, GenerateConfig(max_new_tokens=10))
    assert len(new) == 10
    told = "{} prompt tokens and {} new ones are more than the model's {} positions: .* lower max_new_tokens"
    with pytest.raises(ValueError, match=told.format(30, 11, 40)):
        generate(model, params, tokens, mask, GenerateConfig(max_new_tokens=11))
    with pytest.raises(ValueError, match=told.format(30, 10, 38)):
        generate(Prefixed(model, 2, 61, 1), params, tokens, mask, GenerateConfig(max_new_tokens=10))


def test_prompts_of_a_run_are_cut_on_the_left_to_the_positions():
    base = types.SimpleNamespace(model=GPT2(GPT2Config(61, n_positions=40)), tokenizer=CharTokenizer())
    (row,) = prompts_of(base, ["x" * 50 + "ab"], 8)
    assert len(row) == 32 and row[-2:] == [ord("a"), ord("b")]
    base.model = Prefixed(base.model, 2, 61, 1)
    assert [len(row) for row in prompts_of(base, ["x" * 50, "ab"], 8)] == [30, 2]
