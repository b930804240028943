"""Hostile pytorch_model.bin files: pickles with code, bombs, views that leave their storage."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest

from jlora.io.torchfile import bin_source, read_bin
from tests.faults.guard import Payload, refused, survives
from tests.faults.torchbytes import PROTO, number, stream, table, tensor, text, zipped


def call(module, name, args=b"(t"):
    return f"c{module}\n{name}\n".encode() + args + b"R"


CODE = {
    **{f"{m}.{n}": zipped(table(w=call(m, n, b"(" + text("touch ran") + b"t"))) for m, n in (
        ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec"),
        ("builtins", "getattr"), ("builtins", "__import__"), ("runpy", "run_path"), ("webbrowser", "open"),
        ("pickle", "loads"), ("numpy", "load"), ("torch", "load"), ("torch.hub", "load"), ("importlib", "reload"),
        ("functools", "partial"), ("operator", "attrgetter"), ("shutil", "rmtree"), ("pip", "main"),
        ("torch._utils", "_rebuild_sparse_tensor"), ("torch", "FloatStorage"), ("collections", "namedtuple"),
        ("tests.faults.guard", "payload"), ("torch.storage", "_load_from_bytes"), ("__builtin__", "apply"),
    )},
    "a payload": zipped(pickle.dumps(Payload(), 2)[2:-1]),
    "a payload, protocol 4": zipped(pickle.dumps(Payload(), 4)[2:-1]),
    "a payload, protocol 0": zipped(pickle.dumps(Payload(), 0)[:-1]),
    "a payload in the older layout": stream(pickle.dumps(Payload(), 2)[2:-1]),
    "a payload alone": pickle.dumps(Payload(), 4),
    "a payload as the magic": stream(magic=pickle.dumps(Payload(), 2)),
    "a payload as a key": zipped(b"}(" + pickle.dumps(Payload(), 2)[2:-1] + b"Nu"),
    "INST": zipped(table(w=b"(" + text("x") + b"ios\nsystem\n")),
    "OBJ": zipped(table(w=b"(cos\nsystem\n" + text("x") + b"o")),
    "NEWOBJ": zipped(table(w=b"ccollections\nOrderedDict\n)\x81")),
    "NEWOBJ_EX": zipped(table(w=b"ccollections\nOrderedDict\n)}\x92")),
    "STACK_GLOBAL": zipped(table(w=b"\x8c\x02os\x8c\x06system\x93)R")),
    "EXT": zipped(table(w=b"\x82\x01")),
    "PERSID": zipped(table(w=b"Pstorage\n")),
    "a name as a function": zipped(table(w=text("print") + b")R")),
    "a tensor as a function": zipped(table(w=tensor() + b")R")),
    "attributes of a module": zipped(table(w=b"cos\nenviron\n}(" + text("X") + text("1") + b"ub")),
}  # fmt: skip

BOMBS = {
    "a compressed pickle": zipped(table(w=tensor(), x=text("a" * 10_000_000)), compress=zipfile.ZIP_DEFLATED),
    "a compressed storage": zipped(
        table(w=tensor(size=2**22, shape=(2**22,), stride=(1,))), {"0": bytes(2**24)}, compress=zipfile.ZIP_DEFLATED
    ),
    "lzma": zipped(compress=zipfile.ZIP_LZMA),
    "memo number 2^32 - 1": zipped(table(w=b"Nr\xff\xff\xff\xff") + b"h\x07"),
    "a text of 2^31 bytes": zipped(b"X\xff\xff\xff\x7f"),
    "a text of 2^63 bytes": zipped(b"\x8d" + b"\xff" * 7 + b"\x7f"),
    "a number of 2^31 bytes": zipped(b"\x8b\xff\xff\xff\x7f"),
    "bytes of 2^40": stream(b"\x8e" + struct.pack("<Q", 2**40)),
    "tuples of tuples as a key": zipped(b"}(N" + b"q\x00h\x00h\x00\x86" * 60 + b"Nu"),
    "a million marks": zipped(b"(" * 3_000_000),
    "a million lists": zipped(b"]" * 2_000_000),
    "lists in lists": zipped(b"](" * 100_000 + b"e" * 100_000),
    "elements repeated": zipped(table(w=tensor(shape=(2**40,), stride=(0,)))),
    "elements repeated a little": zipped(table(w=tensor(shape=(5, 3, 4), stride=(0, 4, 1)))),
    "a shape of 2^62": zipped(table(w=tensor(shape=(2**62,), stride=(1,)))),
    "a shape that overflows": zipped(table(w=tensor(shape=(2**32, 2**32), stride=(0, 0)))),
    "a thousand axes": zipped(table(w=tensor(shape=(1,) * 1000, stride=(1,) * 1000))),
    "a storage of 2^60": zipped(table(w=tensor(size=2**60, shape=(2**60,), stride=(1,)))),
    "an older storage of 2^60": stream(table(w=tensor(size=2**60, shape=(2**60,), stride=(1,), view=b"N"))),
}

WRONG = {
    "a stride below 0": zipped(table(w=tensor(stride=(-4, 1), offset=8))),
    "an offset below 0": zipped(table(w=tensor(offset=-4))),
    "an offset past the end": zipped(table(w=tensor(offset=1))),
    "a shape below 0": zipped(table(w=tensor(shape=(-3, 4)))),
    "a shape below 0 twice": zipped(table(w=tensor(shape=(-3, -4)))),
    "strides past the end": zipped(table(w=tensor(stride=(5, 1)))),
    "strides of 2^61": zipped(table(w=tensor(stride=(2**61, 1)))),
    "too few strides": zipped(table(w=tensor(stride=(1,)))),
    "a shape with text": zipped(table(w=tensor(shape=(text("3"), 4)))),
    "a shape with a fraction": zipped(table(w=tensor(shape=(b"G" + struct.pack(">d", 3.0), 4)))),
    "a shape with True": zipped(table(w=tensor(shape=(b"\x88", 12)))),
    "an offset of None": zipped(table(w=tensor(offset=b"N"))),
    "a size of text": zipped(table(w=tensor(size=text("12")))),
    "a size below 0": zipped(table(w=tensor(size=-1))),
    "an unknown storage": zipped(table(w=tensor(dtype="torch ComplexStorage"))),
    "a storage that is no type": zipped(table(w=tensor(dtype="collections OrderedDict"))),
    "a storage that is not there": zipped(table(w=tensor(key="7"))),
    "a storage with a path": zipped(table(w=tensor(key="../../etc/passwd"))),
    "a storage too short": zipped(storages={"0": bytes(44)}),
    "a persistent id of text": zipped(table(w=text("0") + b"Q")),
    "a persistent id too short": zipped(table(w=b"(" + text("storage") + b"tQ")),
    "a tensor of nothing": zipped(table(w=b"ctorch._utils\n_rebuild_tensor_v2\n)R")),
    "a tensor of text": zipped(table(w=b"ctorch._utils\n_rebuild_tensor_v2\n(" + text("a") * 4 + b"tR")),
    "a parameter of nothing": zipped(table(w=b"ctorch._utils\n_rebuild_parameter\n)R")),
    "a size of nothing": zipped(table(w=b"ctorch\nSize\n)R")),
    "a table of no pairs": zipped(b"ccollections\nOrderedDict\n(](K\x01K\x02etR"),
    "a memo never written": zipped(b"h\x05"),
    "an empty stack": zipped(b"0"),
    "nothing": zipped(b""),
    "set on a list": zipped(b"]" + text("a") + b"Ns"),
    "append to a table": zipped(b"}Na"),
    "no mark": zipped(b"}Nu"),
    "a list for a key": zipped(b"}]Ns"),
    "a list": zipped(b"]"),
    "a number": zipped(number(3)),
    "an unknown instruction": zipped(b"\xff"),
    "no data.pkl": zipped(name="archive/other.pkl"),
    "a data.pkl with no folder": zipped(name="data.pkl"),
    "text that is not UTF-8": zipped(b"X\x02\x00\x00\x00\xff\xfe"),
    "no zip after all": b"PK\x03\x04" + bytes(200),
    "nothing at all": b"",
    "text": b"hello " * 100,
    "another magic": stream(magic=PROTO + number(7) + b"."),
    "an older storage missing": stream(keys=(), storages=[]),
    "an older storage of another name": stream(keys=("1",)),
    "an older storage too short": stream(storages=[bytes(44)]),
    "an older storage cut": stream()[:-5],
    "older keys of another kind": stream()[:-60] + b"\x80\x02K\x03.",
    **{f"zip cut to {n}": zipped()[:n] for n in (4, 30, 60, 100, 200, 300, 400, len(zipped()) - 1)},
    **{f"older cut to {n}": stream()[:n] for n in (2, 12, 20, 50, 100, 200, 250, len(stream()) - 48)},
}  # fmt: skip


def read(path):
    return {name: np.asarray(x) for name, x in read_bin(path).items()}


@pytest.mark.parametrize("make", [zipped, stream])
def test_the_files_that_the_cases_change_are_good(make, tmp_path):
    (tmp_path / "x.bin").write_bytes(make())
    assert read(tmp_path / "x.bin")["w"].shape == (3, 4)


@pytest.mark.parametrize("name", CODE | BOMBS | WRONG)
def test_refused(name, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes((CODE | BOMBS | WRONG)[name])
    refused(lambda: read(path), tmp_path, r"x\.bin (cannot be read as PyTorch weights|holds a)")


@pytest.mark.parametrize("make", [zipped, stream])
@pytest.mark.parametrize("part", range(8))
def test_a_changed_bit(make, part, tmp_path):
    whole = make()
    for at in range(part, len(whole), 8):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at // 8 % 8)
        (tmp_path / "x.bin").write_bytes(changed)
        survives(lambda: read(tmp_path / "x.bin"), tmp_path)


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "sub/x.bin", "x\x00.bin", "absent.bin", "", 3, None])
def test_an_index_is_refused(name, tmp_path):
    (tmp_path.parent / "x.bin").write_bytes(zipped())
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refused(lambda: bin_source(tmp_path), tmp_path, r"index\.json|absent\.bin")
