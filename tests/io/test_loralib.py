"""loralib's checkpoints: the authors' released adapter, and a fused projection against loralib's own formula."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.io.loralib import load_loralib, loralib_arrays, unmerged
from jlora.io.peft import save_peft
from jlora.io.peft_read import load_peft
from jlora.io.torchfile import read_bin
from jlora.models.bert import Bert, BertConfig, hf_tensors
from jlora.tree import size

SHARED = Path(os.environ.get("JLORA_SHARED", "../shared")) / "data" / "loralib_roberta_base_mnli"
ROBERTA = BertConfig(50265, 768, 3072, 12, 12, 514, 1, 1e-5, pad_token_id=1, num_labels=3, model_type="roberta")


@pytest.mark.shared
def test_the_released_adapter_there_and_back(tmp_path):
    path = SHARED / "roberta_base_lora_mnli.bin"
    if not path.is_file():
        pytest.skip("the released adapter is not here: set JLORA_SHARED")
    model, tensors = Bert(ROBERTA, head="classify"), hf_tensors(ROBERTA, head="classify")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape if s.size < 2**23 else (1, 1), s.dtype), shapes)
    _, lora, config = load_loralib(path, zeros, tensors, alpha=16)
    query = lora["encoder"]["layer"]["attention"]["self"]["query"]["kernel"]
    assert query.lora_a.shape == (12, 768, 8) and query.scaling == 2.0
    assert size(lora) == 12 * 2 * 2 * 8 * 768 + 768 * 768 + 768 + 768 * 3 + 3
    first = {name: np.asarray(x) for name, x in read_bin(path).items()}
    save_peft(tmp_path, lora, config, tensors, "roberta-base", task="SEQ_CLS")
    _, again, _ = load_peft(tmp_path, zeros, tensors)
    back = loralib_arrays(again, tensors)
    assert set(back) == set(first)
    for name, array in first.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_a_fused_projection_is_what_loralib_computes():
    rng = np.random.default_rng(0)
    rank, width, enable = 3, 5, (True, False, True)
    a, b = rng.normal(size=(2 * rank, 7)), rng.normal(size=(2 * width, rank))
    ours_a, ours_b, found = unmerged(a, b, (7, 3 * width), enable)
    want = np.zeros((3 * width, 7))
    want[:width] = b[:width] @ a[:rank]  # a convolution in two groups: each part of B meets its own rows of A
    want[2 * width :] = b[width:] @ a[rank:]
    assert found == rank
    np.testing.assert_allclose((ours_a @ ours_b).T, want)


def test_what_does_not_fit_is_told(monkeypatch):
    config = BertConfig(31, 16, 24, 2, 4, num_labels=3, model_type="roberta")
    model, tensors = Bert(config, head="classify"), hf_tensors(config, head="classify")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    query = "roberta.encoder.layer.0.attention.self.query"
    good = {f"{query}.lora_A": np.ones((2, 16)), f"{query}.lora_B": np.ones((16, 2))}
    head = "classifier.out_proj.bias"
    for name, array, said in (
        (head, np.ones((7, 5)), rf"{head} \[7, 5\], for a tensor \[3\]"),
        (head, np.array([0.0, np.nan, 0.0]), f"{head} holds NaN or infinity"),
        (head, np.ones(3, np.int64), f"{head} holds int64, not floats"),
        (f"{query}.lora_A", np.full((2, 16), np.inf), "lora_A holds NaN or infinity"),
        (f"{query}.lora_A", np.ones(16), r"A \[16\] and B \[16, 2\] are not two matrices"),
    ):
        monkeypatch.setattr("jlora.io.loralib.read_bin", lambda path, held={**good, name: array}: held)
        with pytest.raises(ValueError, match=rf"x.bin does not fit the model \(1 tensors\): .*{said}"):
            load_loralib("x.bin", shapes, tensors, alpha=8)


def test_gpt2_there_and_back(tmp_path):
    torch = pytest.importorskip("torch")
    from jlora.models.gpt2 import GPT2, GPT2Config
    from jlora.models.gpt2 import hf_tensors as gpt2_tensors

    config = GPT2Config(97, 40, 32, 2, 4)
    model, tensors = GPT2(config), gpt2_tensors(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    held = {}
    for n in range(2):
        held[f"transformer.h.{n}.attn.c_attn.lora_A"] = rng.normal(size=(8, 32)).astype(np.float32)
        held[f"transformer.h.{n}.attn.c_attn.lora_B"] = rng.normal(size=(64, 4)).astype(np.float32)
    torch.save({name: torch.tensor(x) for name, x in held.items()}, tmp_path / "model.pt")
    enable = (True, False, True)
    _, lora, settings = load_loralib(tmp_path / "model.pt", params, tensors, alpha=32, enable=enable)
    assert lora["h"]["attn"]["c_attn"]["kernel"].scaling == 8.0
    save_peft(tmp_path / "peft", lora, settings, tensors, "gpt2")
    _, again, _ = load_peft(tmp_path / "peft", params, tensors)
    assert again["h"]["attn"]["c_attn"]["kernel"].scaling == 8.0
    back = loralib_arrays(again, tensors, enable)
    for name, array in held.items():
        np.testing.assert_array_equal(back[name], array)
    with pytest.raises(ValueError, match="a fused projection needs enable="):
        load_loralib(tmp_path / "model.pt", params, tensors, alpha=32)
