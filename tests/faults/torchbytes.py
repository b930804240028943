"""torch's two file layouts assembled by hand, so that every part of them can be wrong."""

from __future__ import annotations

import io
import struct
import zipfile

PROTO = b"\x80\x02"


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(n):
    if isinstance(n, bytes):
        return n
    if -(2**31) <= n < 2**31:
        return b"J" + struct.pack("<i", n)
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key="0", size=12, shape=(3, 4), stride=(4, 1), offset=0, dtype="torch FloatStorage", view=b""):
    module, name = dtype.split(" ")
    storage = b"(" + text("storage") + f"c{module}\n{name}\n".encode() + text(key) + text("cpu") + number(size)
    storage += view + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(stride)
    return rebuilt + b"\x89ccollections\nOrderedDict\n)RtR"


def table(**entries):
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def zipped(body=None, storages=None, name="archive/data.pkl", compress=zipfile.ZIP_STORED):
    """The zip layout's bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as file:
        file.writestr(name, PROTO + (table(w=tensor()) if body is None else body) + b".")
        for key, data in ({"0": bytes(48)} if storages is None else storages).items():
            file.writestr(f"archive/data/{key}", data)
    return out.getvalue()


MAGIC = PROTO + b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def stream(body=None, keys=("0",), storages=None, magic=MAGIC):
    """The older layout's bytes."""
    held = [bytes(48)] if storages is None else storages
    sizes = [len(data) // 4 for data in held]
    view = b"N"
    out = magic + PROTO + number(1001) + b"." + PROTO + table(little_endian=b"\x88") + b"."
    out += PROTO + (table(w=tensor(view=view)) if body is None else body) + b"."
    out += PROTO + b"](" + b"".join(map(text, keys)) + b"e."
    return out + b"".join(struct.pack("<Q", n) + data for n, data in zip(sizes, held, strict=True))
