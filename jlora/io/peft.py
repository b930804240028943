"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, and a model card.

Tensors are `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]; a stack of layers is
written as one pair a layer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.lora import LoraFactors, is_adapter
from jlora.models.tensors import HFTensor
from jlora.tree import path_of

PREFIX = "base_model.model."


def modules(lora: Any, tensors: Sequence[HFTensor]) -> dict[str, tuple[LoraFactors, HFTensor]]:
    """The factors and the Hub tensor of each adapted module, by the module's dotted name."""
    entries = jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_adapter)[0]
    held = {path_of(keys): entry for keys, entry in entries}
    out = {}
    for tensor in tensors:
        entry = held.get(tensor.path)
        if isinstance(entry, LoraFactors):
            out[tensor.name.removesuffix(".weight")] = (entry, tensor)
    lost = set(held) - {tensor.path for _, tensor in out.values()}
    if lost:
        raise ValueError(f"PEFT's LoRA format has no place for {', '.join(sorted(lost))}: merge, and save the model")
    return out


def save_peft(
    folder: str | Path,
    lora: Any,
    config: LoraConfig,
    tensors: Sequence[HFTensor],
    base: str,
    revision: str | None = None,
) -> Path:
    """Write the adapter; the folder's files are complete or absent. Returns the folder.

    base: the Hub id or path of the base model. Raises ValueError for what the format cannot hold.
    """
    import ml_dtypes  # noqa: F401  (safetensors.numpy writes bfloat16 only once this is imported)
    from safetensors.numpy import save

    folder = Path(folder)
    arrays: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, (entry, tensor) in modules(lora, tensors).items():
        a, b = (np.asarray(x if tensor.layer is None else x[tensor.layer]) for x in (entry.lora_a, entry.lora_b))
        rank = a.shape[-1]
        if tensor.transpose or entry.layout.lstrip("s") == "io":
            a, b = a.T, b.T
        embedded = name.endswith("embed_tokens")
        pair = ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A.weight", "lora_B.weight")
        arrays[f"{PREFIX}{name}.{pair[0]}"] = np.ascontiguousarray(a)
        arrays[f"{PREFIX}{name}.{pair[1]}"] = np.ascontiguousarray(b)
        ranks[name] = rank
        alphas[name] = entry.scaling * (math.sqrt(rank) if config.use_rslora else rank)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in ranks}),
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.r},
        "alpha_pattern": {name: a for name, a in alphas.items() if not math.isclose(a, config.lora_alpha)},
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "layers_to_transform": None,
    }
    card = f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [lora, jlora]\n---\n\nA LoRA adapter for {base}.\n"
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / "adapter_model.safetensors", save(arrays, metadata={"format": "pt"}))
    put(folder / "README.md", card.encode())
    put(folder / "adapter_config.json", (json.dumps(written, indent=2) + "\n").encode())
    return folder


def put(path: Path, data: bytes) -> None:
    """Write beside, then rename."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    beside.replace(path)


def load_peft(folder: str | Path, lora: Any, tensors: Sequence[HFTensor]) -> Any:
    """The saved factors in the structure of `lora` (as `lorafy` made it with the same targets and ranks).

    Raises ValueError listing the tensors that are missing or wrongly shaped.
    """
    from safetensors.numpy import load_file

    held = load_file(Path(folder) / "adapter_model.safetensors")
    rows: dict[str, list[tuple[HFTensor, np.ndarray, np.ndarray]]] = {}
    wrong = []
    for name, (entry, tensor) in modules(lora, tensors).items():
        kinds = (
            ("lora_embedding_A", "lora_embedding_B")
            if name.endswith("embed_tokens")
            else ("lora_A.weight", "lora_B.weight")
        )
        keys = [f"{PREFIX}{name}.{kind}" for kind in kinds]
        shapes = [(x.shape if tensor.layer is None else x.shape[1:])[::-1] for x in (entry.lora_a, entry.lora_b)]
        for key, shape in zip(keys, shapes, strict=True):
            if key not in held or held[key].shape != shape:
                wrong.append(f"{key} {list(held[key].shape) if key in held else 'missing'}, expected {list(shape)}")
        if not wrong:
            rows.setdefault(tensor.path, []).append((tensor, held[keys[0]].T, held[keys[1]].T))
    if wrong:
        raise ValueError(f"{folder} does not fit ({len(wrong)} tensors): {'; '.join(wrong[:6])}")

    def fill(keys: Any, entry: Any) -> Any:
        parts = rows[path_of(keys)]
        if parts[0][0].layer is None:
            (_, a, b), *_ = parts
        else:
            parts = sorted(parts, key=lambda part: part[0].layer or 0)
            a, b = np.stack([part[1] for part in parts]), np.stack([part[2] for part in parts])
        dtype = entry.lora_a.dtype
        return dataclasses.replace(entry, lora_a=jnp.asarray(a, dtype), lora_b=jnp.asarray(b, dtype))

    return jax.tree_util.tree_map_with_path(fill, lora, is_leaf=is_adapter)
