"""GGUF: every quantisation is what the gguf package says it is, in the Hub's order; damaged files are refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from jlora.io import load
from jlora.io.gguf import gguf_name
from jlora.io.save import save
from jlora.models.llama import LlamaConfig, hf_tensors
from jlora.tree import paths

gguf = pytest.importorskip("gguf")
CONFIG = LlamaConfig(8, 256, 256, 2, 4, 2, 64, rms_norm_eps=1e-5, tie_word_embeddings=True)
WORDS = ["<s>", "</s>", "a", "b", "c", "ab", "<tool>", "Ġ"]
RNG = np.random.default_rng(0)


def write(path, kind, arch="llama", pre="smollm", more=(), **begin):
    """A small model whose matrices are of one quantisation; returns the raw arrays by GGUF name.

    more: tensors besides. begin: methods of the writer, for the begin token or the rope, each with its argument.
    """
    quant = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 4, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for name, value in begin.items():
        getattr(writer, name)(value)
    held = {}
    sizes = {"k_proj": (128, 256), "v_proj": (128, 256), "embed": (8, 256)}
    for tensor in hf_tensors(CONFIG):
        name = gguf_name(tensor.name)
        shape = (256,) if "norm" in name else next((s for n, s in sizes.items() if n in tensor.name), (256, 256))
        w = RNG.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            held[name] = (w, gguf.GGMLQuantizationType.F32)
            writer.add_tensor(name, w)
            continue
        try:
            data = gguf.quantize(w, quant)
        except NotImplementedError:  # the package reads this kind and does not write it: any bytes are some weights
            block, size = gguf.GGML_QUANT_SIZES[quant]
            data = RNG.integers(0, 60, (shape[0], shape[1] // block * size), np.uint8)
        held[name] = (data, quant)
        writer.add_tensor(name, data, raw_dtype=quant)
    for name in more:
        writer.add_tensor(name, np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation(kind, tmp_path):
    held = write(tmp_path / "m.gguf", kind)
    base = load(str(tmp_path / "m.gguf"))
    leaves = paths(base.params)
    for tensor in base.tensors:
        data, quant = held[gguf_name(tensor.name)]
        want = np.asarray(gguf.dequantize(data, quant), np.float32)
        if tensor.name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves each head's two halves
            want = want.reshape(-1, 32, 2, 256).swapaxes(1, 2).reshape(want.shape)
        got = np.asarray(leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer])
        np.testing.assert_array_equal(got.T if tensor.transpose else got, want)


def test_tokens_of_a_user_are_whole_and_are_shown(tmp_path):
    write(tmp_path / "m.gguf", "F32")
    words = load(str(tmp_path / "m.gguf"), weights=False).tokenizer
    ids = words("ab<tool>c</s>")["input_ids"]
    assert ids == [5, 6, 4, 1]
    assert words.decode(ids, skip_special_tokens=True) == "ab<tool>c"


@pytest.mark.parametrize(
    ("pre", "told", "begins"),
    [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_add_bos_token": False}, False),
        ("smollm", {}, False),
        ("smollm", {"add_add_bos_token": True}, True),
    ],
)
def test_a_begin_token_is_added_where_llama_cpp_would(pre, told, begins, tmp_path):
    write(tmp_path / "m.gguf", "F32", pre=pre, add_bos_token_id=0, **told)
    words = load(str(tmp_path / "m.gguf"), weights=False).tokenizer
    begin = [0] * begins
    assert words("ab")["input_ids"] == [*begin, 5]
    assert words("ab", "c")["input_ids"] == [*begin, 5, *begin, 4]
    assert words("ab", add_special_tokens=False)["input_ids"] == [5]
    assert words.bos_token == "<s>"


@pytest.mark.parametrize("pre, tokens", [("llama-bpe", [7]), ("qwen2", [3, 4])])
def test_a_word_of_llama_3_that_is_a_token_is_never_split(pre, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WORDS", [*WORDS[:-1], "bc"])  # which no merge makes
    write(tmp_path / "m.gguf", "F32", pre=pre)
    words = load(str(tmp_path / "m.gguf"), weights=False).tokenizer
    assert words("bc", add_special_tokens=False)["input_ids"] == tokens


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "F32")
    whole = path.read_bytes()
    for size in (20, 700, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m\.gguf is cut short or damaged"):
            load(str(path))
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match="does not begin with the letters GGUF"):
        load(str(path))
    write(path, "F32", arch="mamba")
    with pytest.raises(ValueError, match="GGUF architecture 'mamba' is not supported"):
        load(str(path))


def test_tensors_that_the_model_lacks_are_refused(tmp_path):
    path = str(tmp_path / "m.gguf")
    write(path, "F32", more=["blk.0.attn_rot_embd.weight"])
    load(path)
    for name, said in (
        ("blk.1.attn_q.bias", r"no place in a llama model: blk\.1\.attn_q\.bias"),
        ("blk.2.attn_norm.weight", r"no place in a llama model: blk\.2\.attn_norm\.weight"),
        ("rope_freqs.weight", "is not read from GGUF: use the Hub's checkpoint"),
    ):
        write(path, "F32", more=[name])
        with pytest.raises(ValueError, match=said):
            load(path, weights=False)


@pytest.mark.parametrize(
    "keys, factor",
    [
        ({"scaling.factor": 8.0}, 8.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scale_linear": 4.0, "scaling.factor": 8.0}, 8.0),
        ({"scaling.type": "none", "scaling.factor": 8.0}, None),
        ({"scaling.type": "linear"}, None),
        ({}, None),
    ],
)
def test_the_rope_is_scaled_where_llama_cpp_would(keys, factor, tmp_path, monkeypatch):
    def add(writer, keys):
        for name, value in keys.items():
            put = writer.add_string if isinstance(value, str) else writer.add_float32
            put(f"llama.rope.{name}", value)

    monkeypatch.setattr(gguf.GGUFWriter, "add_rope", add, raising=False)
    write(tmp_path / "m.gguf", "F32", add_rope=keys)
    scaling = load(str(tmp_path / "m.gguf"), weights=False).config.rope_scaling
    assert scaling == (None if factor is None else (("factor", factor), ("rope_type", "linear")))


def test_what_is_merged_from_it_says_its_length_and_rope_to_every_reader(tmp_path):
    from transformers import AutoConfig

    scaled = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.0}
    write(tmp_path / "m.gguf", "F32", add_context_length=512, add_rope_freq_base=5e5, **scaled)
    base = load(str(tmp_path / "m.gguf"))
    save(tmp_path / "merged", base, base.params)
    told = json.loads((tmp_path / "merged" / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 2.0}
    assert (told["max_position_embeddings"], told["rope_theta"], told["rope_scaling"]) == (512, 5e5, rope)
    theirs = AutoConfig.from_pretrained(tmp_path / "merged")
    assert theirs.max_position_embeddings == 512 and theirs.rope_parameters == {**rope, "rope_theta": 5e5}
    assert load(str(tmp_path / "merged"), weights=False).config == base.config
