"""Named tensors of a checkpoint, read part by part into the leaves of a parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.io.objects import shard_names
from jlora.io.text import one_line
from jlora.models.tensors import HFTensor
from jlora.tree import path_of, paths

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """`shapes`: every tensor's shape, as it is stored; `read(name, index)`: that part of one, in its own dtype."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, Index], np.ndarray]


def safetensors_source(folder: Path) -> Source:
    """The .safetensors of a folder, one file or shards; only the parts asked for are read.

    Raises FileNotFoundError without any, or where the index names a file that is not there; ValueError for a file
    that is cut short or no safetensors.
    """
    import ml_dtypes  # noqa: F401  (safetensors.numpy knows bfloat16 only once this is imported)
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in shard_names(index)]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise FileNotFoundError(f"{index} names {', '.join(lost[:4])} ({len(lost)}), which are not there")
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    held: dict[str, Any] = {}
    for file in files:
        try:
            opened = safe_open(file, framework="numpy")
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} is cut short or no safetensors file: {one_line(error)}") from None
        held.update({name: opened for name in opened.keys()})  # noqa: SIM118
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in held.items()}

    def read(name: str, index: Index) -> np.ndarray:
        part = held[name].get_slice(name)
        try:
            return part[index]
        except (SafetensorError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder}: {name} of dtype {part.get_dtype()} cannot be read: {one_line(error)}"
            ) from None

    return Source(str(folder), shapes, read)


def build(
    shapes: Any,
    tensors: Sequence[HFTensor],
    source: Source,
    *,
    sharding: Callable[[str, Any], Any] | None = None,
    optional: Sequence[str] = (),
    made: Mapping[str, Callable[[Iterable[np.ndarray], Any], Any]] | None = None,
) -> Any:
    """The parameter tree: `shapes` (ShapeDtypeStructs) filled from `source`, a leaf at a time, cast on the way.

    sharding: (path, shape) -> the leaf's `jax.sharding.Sharding`, or None for the default device; each device's part
    is read by itself, so no whole leaf need fit in the host's memory. `optional`: tensors that may be there unread.
    made: {path: f(its layers one by one, its sharding or None) -> what stands in the array's place}.
    Raises ValueError listing every tensor that is missing, unknown or wrongly shaped.
    """
    rows: dict[str, list[HFTensor]] = {}
    for tensor in tensors:
        rows.setdefault(tensor.path, []).append(tensor)
    check_all(shapes, rows, source, optional)

    def leaf(keys: Any, shape: Any) -> Any:
        path = path_of(keys)
        mine = sorted(rows[path], key=lambda t: t.layer or 0)

        def part(index: Any) -> np.ndarray:
            if mine[0].layer is None:
                return read_as(source, mine[0], index, shape.dtype)
            chosen = mine[index[0]]
            sizes = [len(range(*i.indices(n))) for i, n in zip(index, shape.shape, strict=True)]
            out = np.empty(sizes, shape.dtype)
            for n, tensor in enumerate(chosen):
                out[n] = read_as(source, tensor, index[1:], shape.dtype)
            return out

        place = sharding(path, shape) if sharding else None
        if made and path in made:
            every = tuple(slice(None) for _ in shape.shape)
            if mine[0].layer is None:
                return made[path](iter([part(every)]), place)
            return made[path]((part((slice(n, n + 1), *every[1:]))[0] for n in range(shape.shape[0])), place)
        if place is None:
            return jax.device_put(part(tuple(slice(None) for _ in shape.shape)))
        return jax.make_array_from_callback(shape.shape, place, part)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def read_as(source: Source, tensor: HFTensor, index: Index, dtype: Any) -> np.ndarray:
    """One part of a tensor in the tree's orientation and dtype. Raises ValueError for what are no finite floats."""
    part = source.read(tensor.name, index[::-1] if tensor.transpose else index)
    if not jnp.issubdtype(part.dtype, jnp.floating):
        raise ValueError(f"{source.where}: {tensor.name} holds {part.dtype}, not floats: a quantised checkpoint?")
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(part.T if tensor.transpose else part).astype(dtype, copy=False)
    if not finite(out):
        kind = np.dtype(dtype).name
        raise ValueError(f"{source.where}: {tensor.name} holds NaN or infinity (or numbers too large for {kind})")
    return out


def finite(array: np.ndarray) -> bool:
    """Whether every float is a number. Of a bfloat16 the exponent's bits are looked at, many times as fast."""
    if array.dtype.name == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint16)
        return not ((bits & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def check_all(
    shapes: Any, rows: Mapping[str, Sequence[HFTensor]], source: Source, optional: Sequence[str] = ()
) -> None:
    """Raises ValueError listing every missing, unknown and wrongly shaped tensor."""
    leaves = paths(shapes)
    lacking = sorted(set(leaves) - set(rows))
    if lacking:
        raise ValueError(f"no tensor is mapped to {', '.join(lacking)}")
    missing, wrong, known = [], [], set(optional)
    for path, parts in rows.items():
        for tensor in parts:
            known.add(tensor.name)
            if tensor.name not in source.shapes:
                missing.append(tensor.name)
                continue
            want = tuple(leaves[path].shape) if tensor.layer is None else tuple(leaves[path].shape[1:])
            want = want[::-1] if tensor.transpose else want
            if tuple(source.shapes[tensor.name]) != want:
                wrong.append(f"{tensor.name} is {list(source.shapes[tensor.name])}, not {list(want)}")
    unknown = sorted(set(source.shapes) - known)
    found = {"missing": missing, "unknown": unknown, "wrongly shaped": wrong}
    said = [f"{len(names)} {kind}: {some(names)}" for kind, names in found.items() if names]
    if said:
        raise ValueError(f"{source.where} does not fit the model's config. {'. '.join(said)}")


def some(names: Sequence[str], count: int = 12) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return "; ".join(one_line(name) for name in names[:count]) + more
