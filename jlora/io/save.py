"""A model folder in Hub format: safetensors (in shards, with their index), config, tokenizer, generation config."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jlora.io.load import Pretrained
from jlora.io.objects import read_json
from jlora.models.tensors import HFTensor
from jlora.tree import paths

COPIED = ("generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "USE_POLICY.md")
RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers tell an error of the system, in one that is no OSError."""


def save(
    folder: str | Path,
    base: Pretrained,
    params: Any,
    *,
    dtype: Any = np.float32,
    shard_bytes: int = 5_000_000_000,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `params`, a plain tree of `base`'s structure, as a complete model. Returns {output, tensors, bytes}.

    dtype: of the tensors written. shard_bytes: largest file. config: keys of config.json in place of the base's. The
    folder appears whole or not at all.
    Raises FileExistsError if `folder` exists and is not empty, OSError naming it if it cannot be written.
    """
    folder = Path(folder)
    refuse_used(folder)
    told = {**hub_config(base, dtype), **(config or {})}
    with filled(folder) as beside:
        total = write_shards(beside, hub_arrays(base.tensors, params, dtype), shard_bytes)
        (beside / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(beside)
        for name in COPIED:
            # a tokenizer writes the chat template itself, which may be an adapter's
            if base.folder and own(base.folder, name) and not (beside / name).exists():
                shutil.copyfile(base.folder / name, beside / name)
        if base.tokenizer is not None:
            tell_ends(beside / "generation_config.json", base)
    return {"output": str(folder), "tensors": len(base.tensors), "bytes": total}


def tell_ends(file: Path, base: Pretrained) -> None:
    """Put the tokens that end an answer into generation_config.json, which may be there: it is the base's, and a chat
    template of an adapter's may end its turns in another."""
    held = read_json(file) if file.exists() else {"bos_token_id": base.tokenizer.bos_token_id}
    known = held.get("eos_token_id", [])
    known = known if isinstance(known, list) else [known]
    if "eos_token_id" not in held or not {*base.ends} <= {*known}:
        ends = [*dict.fromkeys([*known, *base.ends])]
        held["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
        file.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def refuse_used(path: str | Path) -> None:
    """Raises FileExistsError for a file, or a folder that is not empty: what is there would be lost, or mixed up."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: give another output")


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`, which then takes its name. Where that fails nothing of it is left, and what the
    system said is an OSError that names `folder`."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except (Exception, KeyboardInterrupt) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = str(folder)
        elif told := RUST.search(str(error)):
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(folder)) from None
        raise


def own(folder: Path, name: str) -> bool:
    """Whether the file is the model's: a link that leaves its folder, or the Hub cache's of its repository, is not."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    return (folder / name).is_file() and (folder / name).resolve().is_relative_to(root)


def hub_arrays(tensors: Iterable[HFTensor], params: Any, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of each Hub tensor, one at a time, in the Hub's orientation."""
    leaves = paths(params)
    for tensor in tensors:
        leaf = leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer]
        array = np.asarray(leaf)
        yield tensor.name, np.ascontiguousarray(array.T if tensor.transpose else array).astype(dtype)


def write_shards(folder: Path, arrays: Iterable[tuple[str, np.ndarray]], limit: int) -> int:
    """model.safetensors, or model-00001-of-0000N.safetensors and their index; returns the bytes of all tensors.

    No more than one shard is in memory.
    """
    import ml_dtypes  # noqa: F401  (safetensors.numpy writes bfloat16 only once this is imported)
    from safetensors.numpy import save_file

    names: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(names)}", metadata={"format": "pt"})
        names.append(list(held))
        held.clear()

    for name, array in arrays:
        if held and size + array.nbytes > limit:
            flush()
            size = 0
        held[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(names) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return total
    where = {}
    for n, group in enumerate(names):
        file = f"model-{n + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"shard-{n}").rename(folder / file)
        where.update(dict.fromkeys(group, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def hub_config(base: Pretrained, dtype: Any) -> Mapping[str, Any]:
    """The base's own config.json where it has one, else the config under the Hub's names."""
    if base.folder:
        held = read_json(base.folder / "config.json")
    else:
        held = base.config.to_hf()
        if base.tokenizer is not None:
            held |= {"bos_token_id": base.tokenizer.bos_token_id, "eos_token_id": base.tokenizer.eos_token_id}
    held.pop("torch_dtype", None)
    held.pop("quantization_config", None)
    return {**held, "dtype": np.dtype(dtype).name}
