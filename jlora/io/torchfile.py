"""PyTorch's .bin and .pt files without torch: tensors only, by an unpickler that knows nothing else.

A pickle can run any code when it is read. Here every global but the handful that a state dict needs is refused, so
a file from anywhere can be opened. Both of torch's layouts are read: the zip archive (since 1.6) and the older stream
of pickles.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.io.tensors import Source

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


class Later:
    """A storage of the older layout, whose bytes come after the pickle."""

    def __init__(self, dtype: Any) -> None:
        self.dtype, self.array = dtype, np.empty(0, dtype)


class StateUnpickler(pickle.Unpickler):
    """Unpickles a state dict; `storage(dtype, key, size)` gives what a tensor is a view of."""

    def __init__(self, file: Any, storage: Callable[[Any, str, int], Any]) -> None:
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): Lazy,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no table of weights needs")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, size, *_ = pid
        return self.storage(dtype, key, size)


class Lazy:
    """A tensor: a strided view of a storage, made when asked for."""

    def __init__(self, storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, tuple(shape), tuple(stride)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        flat = self.storage.array if isinstance(self.storage, Later) else self.storage()
        reach = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and not 0 <= reach < flat.size:
            raise ValueError(f"a tensor reaches to element {reach} of a storage of {flat.size}: the file is damaged")
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
        held = from_zip(path) if zipfile.is_zipfile(path) else from_stream(path)
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as PyTorch weights: {error or 'it is cut short'}") from None
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, not a table of tensors by name")
    return {str(name): value for name, value in held.items() if isinstance(value, Lazy)}


def from_zip(path: Path) -> Any:
    """The object of the zip layout; storages stay in the file."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        pickled = archive.read(name)
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    folder = name.removesuffix("data.pkl")

    def storage(dtype: Any, key: str, size: int) -> Any:
        member = f"{folder}data/{key}"
        if sizes[member] < size * np.dtype(dtype).itemsize:
            raise ValueError(f"storage {key} is cut short")

        def read() -> np.ndarray:
            with zipfile.ZipFile(path) as archive:
                return np.frombuffer(archive.read(member), dtype, count=size)

        return read

    return StateUnpickler(io.BytesIO(pickled), storage).load()


def from_stream(path: Path) -> Any:
    """The object of the older layout: pickles in a row, then the storages, each after its length."""
    held: dict[str, Later] = {}

    def storage(dtype: Any, key: str, _: int) -> Later:
        return held.setdefault(str(key), Later(dtype))

    with path.open("rb") as file:
        load = lambda: StateUnpickler(file, storage).load()
        if load() != MAGIC:
            raise ValueError("it does not begin as one")
        load(), load()  # the protocol's version, the machine's sizes
        out = load()
        for key in load():
            size = int.from_bytes(file.read(8), "little")
            entry = held[str(key)]
            raw = file.read(size * np.dtype(entry.dtype).itemsize)
            entry.array = np.frombuffer(raw, entry.dtype)
            if entry.array.size != size:
                raise ValueError(f"storage {key} is cut short")
    return out


def bin_source(folder: Path) -> Source:
    """The pytorch_model.bin of a folder, one file or shards."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["pytorch_model.bin"]
    held: dict[str, Lazy] = {}
    for name in names:
        held.update(read_bin(folder / name))
    shapes = {name: tensor.shape for name, tensor in held.items()}
    return Source(str(folder), shapes, lambda name, index: np.asarray(held[name])[index])
