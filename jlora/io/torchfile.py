"""PyTorch's .bin and .pt files without torch: tensors only, by `jlora.io.pickled`, so that a file from anywhere can be
opened. Both of torch's layouts are read: the zip archive (since 1.6) and the older stream of pickles.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.io.objects import shard_names
from jlora.io.pickled import Global, unpickle
from jlora.io.tensors import Source
from jlora.io.text import one_line

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
MAGIC = 0x1950A86A20F9469CFC6C  # what torch writes first in its older layout
DAMAGED = (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
DAMAGED += (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError)
"""What reading a file that is cut short, changed or made to harm raises in zipfile, pickletools and here."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """`size` elements of `dtype`; `read` fetches them, flat."""

    dtype: Any
    size: int
    read: Callable[[], np.ndarray]


class Lazy:
    """A tensor: a strided view of a storage, made when asked for. Raises ValueError for one that leaves its storage."""

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, tuple(shape), tuple(stride)
        numbers = (offset, *self.shape, *self.stride)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in numbers)
        if not isinstance(storage, Storage) or not whole or len(self.shape) != len(self.stride) or len(self.shape) > 32:
            raise ValueError(f"a tensor of shape {self.shape!r:.80}, strides {self.stride!r:.80}: the file is damaged")
        if 0 in self.shape:
            return
        reach = offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if reach >= storage.size or math.prod(self.shape) > storage.size:
            raise ValueError(
                f"a tensor {list(self.shape)} reaches to element {reach} of a storage of {storage.size}: "
                "the file is damaged"
            )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, dtype or self.storage.dtype)
        flat = self.storage.read()
        steps = [step * flat.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps, writeable=False)
        return np.array(view, dtype)


def read_bin(path: str | Path) -> dict[str, Lazy]:
    """The tensors of a state dict by name; `numpy.asarray` reads one.

    Raises ValueError for a file that is cut short, is no torch file, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        held = from_zip(path) if zipped else from_stream(path)
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read as PyTorch weights: {said(error)}") from None
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, not a table of tensors by name")
    return {str(name): value for name, value in held.items() if isinstance(value, Lazy)}


def said(error: BaseException) -> str:
    """An error of another library in one line."""
    return one_line(error) or "it is cut short"


def storage_type(asked: Global) -> Any:
    return STORAGES.get(asked.name) if asked.module in ("torch", "torch.storage") else None


def from_zip(path: Path) -> Any:
    """The object of the zip layout; storages stay in the file. torch stores its members as they are: a compressed one
    could be of any size, and is refused."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        (name,) = [name for name in members if name.endswith("/data.pkl")]
        pickled = archive.read(stored(members[name], path))
    folder = name.removesuffix("data.pkl")

    def storage(_: Any, dtype: Any, key: str, __: Any, size: int, *___: Any) -> Storage:
        info = stored(members[f"{folder}data/{key}"], path)
        if info.file_size < size * np.dtype(dtype).itemsize or size < 0:
            raise ValueError(f"storage {key} is cut short")

        def read() -> np.ndarray:
            try:
                with zipfile.ZipFile(path) as archive:
                    return np.frombuffer(archive.read(info), dtype, count=size)
            except DAMAGED as error:
                raise ValueError(f"{path}: storage {key} cannot be read: {said(error)}") from None

        return Storage(dtype, size, read)

    return unpickle(pickled, storage_type, Lazy, storage)


def stored(info: zipfile.ZipInfo, path: Path) -> zipfile.ZipInfo:
    """The member, if its bytes lie in the file as they are."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size > path.stat().st_size:
        raise ValueError(f"{info.filename!r:.80} is compressed or encrypted, as torch never writes it")
    return info


def from_stream(path: Path) -> Any:
    """The object of the older layout: pickles in a row, then the storages, each after its length."""
    with path.open("rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # a read is never longer than the file
    places: dict[str, int] = {}
    held: dict[str, Storage] = {}

    def storage(_: Any, dtype: Any, key: Any, __: Any, size: int, *___: Any) -> Storage:
        read = lambda: np.frombuffer(file, dtype, size, places[str(key)])
        return held.setdefault(str(key), Storage(dtype, size, read))

    load: Any = lambda: unpickle(file, storage_type, Lazy, storage)  # pyright: ignore[reportArgumentType]
    if load() != MAGIC:
        raise ValueError("it does not begin as one")
    load()  # the protocol's version
    load()  # the machine's sizes
    out = load()
    for key in load():
        entry, size = held[str(key)], int.from_bytes(file.read(8), "little")
        places[str(key)] = file.tell()
        length = size * np.dtype(entry.dtype).itemsize
        if size != entry.size or length > len(file) - file.tell():
            raise ValueError(f"storage {key} is cut short")
        file.seek(length, 1)
    if set(held) - set(places):
        raise ValueError("it is cut short: not every storage is there")
    return out


def bin_source(folder: Path) -> Source:
    """The pytorch_model.bin of a folder, one file or shards."""
    index = folder / "pytorch_model.bin.index.json"
    names = shard_names(index) if index.is_file() else ["pytorch_model.bin"]
    held: dict[str, Lazy] = {}
    for name in names:
        held.update(read_bin(folder / name))
    shapes = {name: tensor.shape for name, tensor in held.items()}
    return Source(str(folder), shapes, lambda name, index: np.asarray(held[name])[index])
