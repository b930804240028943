"""Hostile GGUF files: absurd counts, wrong types, offsets past the end, metadata that fits no model."""

from __future__ import annotations

import struct

import pytest

from jlora.io.gguf import config_of, open_gguf, read_gguf, tokenizer_of
from tests.faults.guard import refused, survives

pytest.importorskip("gguf")
U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def u32(n):
    return struct.pack("<II", U32, n)


def f32(x):
    return struct.pack("<If", F32, x)


def string(value):
    return struct.pack("<I", STRING) + text(value)


def array(kind, items, count=None):
    return struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count) + b"".join(items)


WORDS = ["<s>", "</s>", "a", "b", "ab"]
KEYS = {
    "general.architecture": string("llama"),
    "llama.embedding_length": u32(32),
    "llama.feed_forward_length": u32(32),
    "llama.block_count": u32(1),
    "llama.attention.head_count": u32(4),
    "llama.attention.head_count_kv": u32(2),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    "tokenizer.ggml.model": string("gpt2"),
    "tokenizer.ggml.pre": string("smollm"),
    "tokenizer.ggml.tokens": array(STRING, [text(word) for word in WORDS]),
    "tokenizer.ggml.token_type": array(5, [struct.pack("<i", n) for n in (3, 3, 1, 1, 1)]),
    "tokenizer.ggml.merges": array(STRING, [text("a b")]),
    "tokenizer.ggml.eos_token_id": u32(1),
}


def tensor(name="token_embd.weight", shape=(32, 5), kind=0, offset=0, axes=None):
    head = text(name) + struct.pack("<I", len(shape) if axes is None else axes)
    return head + b"".join(struct.pack("<Q", n) for n in shape) + struct.pack("<IQ", kind, offset)


TENSOR = tensor()


def pack(keys=None, tensors=(TENSOR,), version=3, counts=None, data=bytes(640), more=b"", magic=b"GGUF"):
    held = KEYS if keys is None else keys
    count = (len(tensors), len(held)) if counts is None else counts
    out = magic + struct.pack("<IQQ", version, *count)
    out += b"".join(text(name) + value for name, value in held.items()) + more + b"".join(tensors)
    return out + bytes(-len(out) % 32) + data


def with_key(name, value):
    return pack({**KEYS, name: value})


WHOLE = pack()
HEADERS = {
    **{f"cut to {n}": WHOLE[:n] for n in (0, 3, 4, 8, 20, 24, 40, 100, 300, 500, len(WHOLE) - 700, len(WHOLE) - 1)},
    "another magic": pack(magic=b"GGML"),
    "big-endian magic": pack(magic=b"FUGG"),
    **{f"version {n}": pack(version=n) for n in (0, 1, 4, 2**24 * 3, 2**32 - 1)},
    **{f"{n} tensors": pack(counts=(n, len(KEYS))) for n in (2, 10**6, 2**32, 2**63, 2**64 - 1)},
    **{f"{n} keys": pack(counts=(1, n)) for n in (len(KEYS) + 1, 10**6, 2**32, 2**63, 2**64 - 1)},
    "fewer keys": pack(counts=(1, 3)),
    **{
        f"a name of {n} bytes": pack(more=struct.pack("<Q", n), counts=(1, 14))
        for n in (10**6, 2**40, 2**63, 2**64 - 1)
    },
    **{f"an array of {n}": with_key("x", array(U8, [], n)) for n in (10**7, 2**31, 2**40, 2**63, 2**64 - 1)},
    **{f"{n} texts": with_key("x", array(STRING, [], n)) for n in (10**6, 2**40, 2**64 - 1)},
    "nine million bytes, there": with_key("x", array(U8, [bytes(9_000_000)], 9_000_000)),
    "an array of arrays": with_key("x", array(ARRAY, [struct.pack("<IQ", U8, 0)])),
    "arrays in arrays": with_key("x", struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000),
    "an array of nothing known": with_key("x", array(77, [b"\0"])),
    **{f"a value of type {n}": with_key("x", struct.pack("<II", n, 3)) for n in (13, 99, 2**31, 2**32 - 1)},
    "a key twice": pack(more=text("general.architecture") + string("llama"), counts=(1, len(KEYS) + 1)),
    "a key that is not UTF-8": pack(more=text(b"\xff\xfe") + u32(1), counts=(1, len(KEYS) + 1)),
    **{f"alignment {n}": with_key("general.alignment", u32(n)) for n in (0, 3, 2**31, 33)},
    "alignment of text": with_key("general.alignment", string("32")),
    **{f"{n} axes": pack(tensors=(tensor(axes=n),)) for n in (0, 1, 5, 2**31, 2**32 - 1)},
    **{f"a tensor of type {n}": pack(tensors=(tensor(kind=n),)) for n in (4, 5, 36, 99, 2**32 - 1)},
    "a tensor of no whole blocks": pack(tensors=(tensor(shape=(33, 5), kind=2),)),
    "an empty tensor": pack(tensors=(tensor(shape=(0, 5)),)),
    "a tensor past the end": pack(tensors=(tensor(shape=(32, 6)),)),
    "an offset past the end": pack(tensors=(tensor(offset=64),)),
    "an offset of 2^64 - 32": pack(tensors=(tensor(offset=2**64 - 32),)),
    "a shape that overflows to nothing": pack(tensors=(tensor(shape=(2**32, 2**32)),)),
    "a shape that overflows to 160": pack(tensors=(tensor(shape=(32, 5, 2**62, 4)),)),
    "a tensor twice": pack(tensors=(tensor(), tensor())),
    "a tensor's name not UTF-8": pack(tensors=(tensor(b"\xff"),)),
}
MODELS = {
    **{f"without {name}": pack({k: v for k, v in KEYS.items() if k != name}) for name in KEYS
       if not name.endswith(("_kv", ".pre", "token_id", "merges", "token_type", "ggml.model"))},
    **{f"{name} of text": with_key(name, string("x\x1b[2J")) for name in KEYS if name.startswith("llama")},
    **{f"{name} in a list": with_key(name, array(U32, [struct.pack("<I", 4)] * 2)) for name in KEYS
       if name.startswith("llama")},
    **{f"{name} of truth": with_key(name, struct.pack("<IB", BOOL, 1)) for name in KEYS if name.startswith("llama")},
    "no heads": with_key("llama.attention.head_count", u32(0)),
    "no width": with_key("llama.embedding_length", u32(0)),
    "a billion layers": with_key("llama.block_count", u32(10**9)),
    "no layers": with_key("llama.block_count", u32(0)),
    "a width of 2^31": with_key("llama.embedding_length", u32(2**31)),
    "heads of 2^63": with_key("llama.attention.head_count", struct.pack("<IQ", U64, 2**63)),
    "NaN": with_key("llama.attention.layer_norm_rms_epsilon", f32(float("nan"))),
    "infinity": with_key("llama.rope.freq_base", f32(float("inf"))),
    "scaled by 0": pack({**KEYS, "llama.rope.scaling.type": string("linear"), "llama.rope.scaling.factor": f32(0.0)}),
    "an unknown scaling": with_key("llama.rope.scaling.type", string("yarn")),
    "an unknown architecture": with_key("general.architecture", string("mamba\n\x1b[2J" * 100)),
    "an architecture that is not UTF-8": with_key("general.architecture", string(b"\xff")),
    "an architecture of a number": with_key("general.architecture", u32(3)),
    "tokens of numbers": with_key("tokenizer.ggml.tokens", u32(5)),
}  # fmt: skip
TOKENIZERS = {
    "another kind": with_key("tokenizer.ggml.model", string("llama")),
    "an unknown splitting": with_key("tokenizer.ggml.pre", string("x")),
    "tokens of numbers": with_key("tokenizer.ggml.tokens", array(U8, [b"\1"] * 5)),
    "too few types": with_key("tokenizer.ggml.token_type", array(5, [struct.pack("<i", 1)])),
    "merges of one": with_key("tokenizer.ggml.merges", array(STRING, [text("ab")])),
    "merges of nothing known": with_key("tokenizer.ggml.merges", array(STRING, [text("q x")])),
    "merges of numbers": with_key("tokenizer.ggml.merges", array(U8, [b"\1"])),
    "an end past the vocabulary": with_key("tokenizer.ggml.eos_token_id", u32(5)),
    "an end of text": with_key("tokenizer.ggml.eos_token_id", string("</s>")),
    "a template of numbers": with_key("tokenizer.chat_template", u32(3)),
    "tokens that are not UTF-8": with_key("tokenizer.ggml.tokens", array(STRING, [text(b"\xff")] * 5)),
    "no merges": pack({k: v for k, v in KEYS.items() if k != "tokenizer.ggml.merges"}),
    "no types": pack({k: v for k, v in KEYS.items() if k != "tokenizer.ggml.token_type"}),
}


def test_the_file_that_the_cases_change_is_good(tmp_path):
    (tmp_path / "m.gguf").write_bytes(WHOLE)
    reader = open_gguf(tmp_path / "m.gguf")
    assert config_of(reader).vocab_size == 5 and tokenizer_of(reader)("ab")["input_ids"] == [4]


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_refused(name, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(HEADERS[name])
    refused(lambda: open_gguf(path), tmp_path, r"m\.gguf is (cut short or damaged|no GGUF file)")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused(name, tmp_path):
    (tmp_path / "m.gguf").write_bytes(MODELS[name])
    refused(lambda: read_gguf(tmp_path / "m.gguf"), tmp_path, "GGUF|rope|layers")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_refused(name, tmp_path):
    (tmp_path / "m.gguf").write_bytes(TOKENIZERS[name])
    refused(lambda: tokenizer_of(open_gguf(tmp_path / "m.gguf")), tmp_path, "GGUF")


@pytest.mark.parametrize("part", range(8))
def test_a_changed_bit(part, tmp_path):
    size = len(WHOLE) - 640
    for at in range(part, size, 16):
        changed = bytearray(WHOLE)
        changed[at] ^= 1 << (at // 16 % 8)
        (tmp_path / "m.gguf").write_bytes(changed)

        def read():
            reader = open_gguf(tmp_path / "m.gguf")
            config_of(reader), tokenizer_of(reader)

        survives(read, tmp_path)
