"""Hostile .safetensors files and shard indices."""

from __future__ import annotations

import json
import struct

import jax
import numpy as np
import pytest

from jlora.io.tensors import build, safetensors_source
from jlora.models.tensors import HFTensor
from tests.faults.guard import refused, survives

SHAPES = {"a": jax.ShapeDtypeStruct((3, 4), np.float32), "b": jax.ShapeDtypeStruct((4,), np.float32)}
TENSORS = [HFTensor("a.weight", "a", transpose=True), HFTensor("b", "b")]
A = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
B = {"dtype": "F32", "shape": [4], "data_offsets": [48, 64]}
DATA = np.arange(16, dtype=np.float32).tobytes()


def pack(a=A, b=B, data=DATA, size=None, header=None, **more):
    """A file's bytes; `header` replaces the whole header."""
    held = {name: part for name, part in {"a.weight": a, "b": b, **more}.items() if part is not None}
    text = json.dumps(held).encode() if header is None else header
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def read(folder):
    return build(SHAPES, TENSORS, safetensors_source(folder))


def values(kind, *numbers):
    return np.resize(np.asarray(numbers, kind), 16).tobytes()


def as_dtype(name, width):
    offsets = [0, 12 * width], [12 * width, 16 * width]
    return pack(
        {**A, "dtype": name, "data_offsets": offsets[0]}, {**B, "dtype": name, "data_offsets": offsets[1]},
        b"\x01" * 16 * width,
    )  # fmt: skip


WHOLE = pack()
HEADER = WHOLE[8 : len(WHOLE) - 64]
CASES = {
    **{f"cut to {n}": WHOLE[:n] for n in (0, 1, 7, 8, 9, 40, len(HEADER), len(HEADER) + 8, len(WHOLE) - 1)},
    **{f"header of {n}": pack(size=n) for n in (0, 1, len(HEADER) - 1, len(WHOLE), 2**31, 2**32, 2**63, 2**64 - 1)},
    "header just over the limit": pack(header=b"{" + b" " * 100_000_000),
    "bytes after the end": WHOLE + b"more",
    "no JSON": pack(header=b"hello"),
    "no object": pack(header=b"[]"),
    "null": pack(header=b"null"),
    "not UTF-8": pack(header=HEADER.replace(b"b", b"\xff")),
    "deep": pack(header=b'{"a.weight":' * 5000 + b"1" + b"}" * 5000),
    "deep lists": pack(header=b'{"x":' + b"[" * 200_000),
    "an unclosed text": pack(header=b'{"a.weight'),
    "metadata of another kind": pack(__metadata__={"a": 3}),
    "dtype missing": pack({"shape": [4, 3], "data_offsets": [0, 48]}),
    "shape missing": pack({"dtype": "F32", "data_offsets": [0, 48]}),
    "offsets missing": pack({"dtype": "F32", "shape": [4, 3]}),
    "offsets past the end": pack(b={**B, "data_offsets": [48, 64 + 16]}),
    "offsets overlap": pack(b={**B, "data_offsets": [32, 48]}),
    "offsets the same": pack({**A, "shape": [4], "data_offsets": [48, 64]}),
    "offsets with a gap": pack(b={**B, "shape": [2], "data_offsets": [56, 64]}),
    "offsets reversed": pack(b={**B, "data_offsets": [64, 48]}),
    "offsets below 0": pack(b={**B, "data_offsets": [-16, 0]}),
    "offsets of 2^64": pack(b={**B, "data_offsets": [2**64 - 16, 2**64]}),
    "offsets of 1e300": pack(b={**B, "data_offsets": [1e300, 1e300]}),
    "one offset": pack(b={**B, "data_offsets": [48]}),
    "offsets as text": pack(b={**B, "data_offsets": ["48", "64"]}),
    "no offsets": pack(b={**B, "data_offsets": None}),
    "a shape below 0": pack(b={**B, "shape": [-4]}),
    "a shape of 2^63": pack(b={**B, "shape": [2**63]}),
    "a shape that overflows to 4": pack(b={**B, "shape": [2**62, 16, 4]}),
    "a shape with a fraction": pack(b={**B, "shape": [4.5]}),
    "a shape of text": pack(b={**B, "shape": "4"}),
    "a shape that is no 16 bytes": pack(b={**B, "shape": [5]}),
    "a deep shape": pack(b={**B, "shape": [[[[4]]]]}),
    "other axes": pack({**A, "shape": [3, 4]}),
    "more axes": pack({**A, "shape": [2, 2, 3]}),
    "no axes": pack(b={**B, "shape": [], "data_offsets": [48, 52]}, data=DATA[:52]),
    "an empty tensor": pack(b={**B, "shape": [0], "data_offsets": [48, 48]}, data=DATA[:48]),
    "another name": pack(b=None, c=B),
    "a tensor missing": pack(b=None, data=DATA[:48]),
    "a tensor more": pack(c={**B, "data_offsets": [64, 80]}, data=DATA + DATA[:16]),
    **{f"dtype {name}": pack(b={**B, "dtype": name}) for name in ("F33", "", None, 3, "f32", "OBJECT")},
    **{f"weights of {n}": as_dtype(n, w) for n, w in (("I64", 8), ("I32", 4), ("I16", 2), ("I8", 1), ("U8", 1))},
    **{f"weights of {n}": as_dtype(n, w) for n, w in (("BOOL", 1), ("U16", 2), ("U32", 4), ("U64", 8), ("C64", 8))},
    "NaN": pack(data=values("f4", np.nan, 1)),
    "one NaN": pack(data=DATA[:-4] + values("f4", np.nan)[:4]),
    "infinity": pack(data=values("f4", 1, np.inf)),
    "minus infinity": pack(data=values("f4", -np.inf, 1)),
    "floats too large": as_dtype("F64", 8)[: -16 * 8] + values("f8", 1e300),
    "NaN in bfloat16": as_dtype("BF16", 2)[: -16 * 2] + values("u2", 0x7FC0),
    "infinity in bfloat16": as_dtype("BF16", 2)[: -16 * 2] + values("u2", 0x3F80, 0xFF80),
    "NaN in float16": as_dtype("F16", 2)[: -16 * 2] + values("f2", np.nan),
}


def test_the_file_that_the_cases_change_is_good(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    np.testing.assert_array_equal(read(tmp_path)["b"], np.arange(12, 16))


@pytest.mark.parametrize("name", CASES)
def test_refused(name, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(CASES[name])
    refused(lambda: read(tmp_path), tmp_path, "safetensors|fit the model|holds")


@pytest.mark.parametrize("at", range(0, len(HEADER) + 8, 6))
def test_a_changed_bit_of_the_header(at, tmp_path):
    for bit in range(8):
        changed = bytearray(WHOLE)
        changed[at] ^= 1 << bit
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert not survives(lambda: read(tmp_path), tmp_path) or changed[at : at + 1].isspace()


INDICES = {
    **{f"names {name!r}": {"weight_map": {"a.weight": name}} for name in (
        "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\\b", "x\0y", "~/x", "none", 3,
        None, ["model.safetensors"], {"a": 1},
    )},
    "a list": [],
    "no map": {},
    "an empty map": {"weight_map": {}},
    "a map of another kind": {"weight_map": ["model.safetensors"]},
    "NaN": '{"weight_map": {"a": NaN}}',
    "cut": '{"weight_map": {"a": "model',
    "deep": '{"weight_map":' * 50_000,
    "not UTF-8": b'{"weight_map": {"a": "\xff\xfe"}}',
    "a huge number": '{"weight_map": {"a": ' + "9" * 10_000 + "}}",
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_an_index_is_refused(name, tmp_path):
    held = INDICES[name]
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    (tmp_path.parent / "model.safetensors").write_bytes(WHOLE)
    text = held if isinstance(held, bytes) else (held if isinstance(held, str) else json.dumps(held)).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    refused(lambda: read(tmp_path), tmp_path, r"model\.safetensors\.index\.json")


def test_an_index_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(3 * 2**30)
    refused(lambda: read(tmp_path), tmp_path, "no such file needs more than")
