"""Adapters written in PEFT's format: adapter_config.json, adapter_model.safetensors and a model card.

Tensors are `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r] (`lora_embedding_A` and `_B`
for an embedding, `lora_magnitude_vector` for DoRA), a module of a stack by itself; a leaf trained whole goes under its
plain name. Reading is in `peft_read.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora.config import LoraConfig
from jlora.io.beside import put_all
from jlora.io.tied import copies
from jlora.lora import LoraFactors, is_adapter
from jlora.methods.dora import DoraFactors
from jlora.methods.token_rows import TokenRows
from jlora.models.tensors import HFTensor
from jlora.tree import path_of

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name; the tensor holds the rows themselves."""


def module_of(tensor: HFTensor) -> str:
    """The dotted name of the module that a weight or a bias belongs to."""
    return tensor.name.rpartition(".")[0]


def modules(lora: Any, tensors: Sequence[HFTensor]) -> dict[str, tuple[Any, HFTensor]]:
    """The entry and the Hub tensor of each trained tensor, by the tensor's name.

    Raises ValueError for an entry that is neither LoRA, DoRA, token rows nor a whole leaf of the model.
    """
    held = {path_of(keys): e for keys, e in jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_adapter)[0]}
    out = {tensor.name: (held[tensor.path], tensor) for tensor in tensors if tensor.path in held}
    kinds = (LoraFactors, DoraFactors, TokenRows)
    lost = sorted(set(held) - {tensor.path for _, tensor in out.values()})
    lost += [tensor.path for entry, tensor in out.values() if is_adapter(entry) and not isinstance(entry, kinds)]
    if lost:
        raise ValueError(f"PEFT's LoRA format has no place for {', '.join(dict.fromkeys(lost))}: merge, and save that")
    return out


def save_peft(
    folder: str | Path,
    lora: Any,
    config: LoraConfig,
    tensors: Sequence[HFTensor],
    base: str,
    revision: str | None = None,
    *,
    task: str | None = "CAUSAL_LM",
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapter; the folder's files are complete or absent. Returns the folder.

    base: the Hub id or path of the base model. task: PEFT's task_type. card: lines of the model card, by name (data,
    metrics). Raises ValueError for what the format cannot hold.
    """
    folder = Path(folder)
    found = modules(lora, tensors)
    arrays: dict[str, np.ndarray] = {}
    factors: dict[str, LoraFactors] = {}
    adapted = {module_of(t) for e, t in found.values() if isinstance(e, LoraFactors | DoraFactors)}
    whole: list[HFTensor] = []
    rows: dict[str, list[int]] = {}
    for entry, tensor in found.values():
        row = lambda x, tensor=tensor: np.asarray(x if tensor.layer is None else x[tensor.layer])
        name = module_of(tensor)
        if not is_adapter(entry):
            inner = ".base_layer" if name in adapted else ""
            key = f"{PREFIX}{name}{inner}.{tensor.name.rpartition('.')[2]}"
            arrays[key] = np.ascontiguousarray(row(entry).T if tensor.transpose else row(entry))
            whole.append(tensor)
            continue
        if isinstance(entry, TokenRows):
            arrays[f"{PREFIX}{name}.{ROWS}"] = np.asarray(entry.rows)
            rows[name.rpartition(".")[2]] = list(entry.ids)
            continue
        pair = entry.lora if isinstance(entry, DoraFactors) else entry
        embedded = tensor.path.endswith("/embedding")
        kinds = ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A.weight", "lora_B.weight")
        for kind, array in zip(kinds, (pair.lora_a, pair.lora_b), strict=True):
            arrays[f"{PREFIX}{name}.{kind}"] = np.ascontiguousarray(row(array).T)
        if isinstance(entry, DoraFactors):
            arrays[f"{PREFIX}{name}.{MAGNITUDE}"] = np.ascontiguousarray(row(entry.magnitude))
        factors[name] = pair
    tied = copies({name.removeprefix(PREFIX): x for name, x in arrays.items()}, tensors)
    arrays |= {PREFIX + name: x for name, x in tied.items()}
    written = config_of(config, factors, whole, found, tensors)
    if written["modules_to_save"]:  # under the names asked for; PEFT adds a classifier's by itself
        known = [*config.modules_to_save, *(["classifier", "score"] if task == "SEQ_CLS" else [])]
        meant = lambda module: next((name for name in known if f".{name}." in f".{module}."), module)
        written["modules_to_save"] = sorted({meant(module) for module in written["modules_to_save"]})
    written |= {"task_type": task, "base_model_name_or_path": base, "revision": revision}
    # readers of older PEFT choke on keys they do not know: only where they are used
    written |= {"trainable_token_indices": rows} if rows else {}
    written |= {"ensure_weight_tying": True} if tied else {}
    put_adapter(folder, arrays, card_text(base, written, card or {}), written)
    return folder


def config_of(
    config: LoraConfig,
    factors: Mapping[str, LoraFactors],
    whole: Sequence[HFTensor],
    found: Mapping[str, tuple[Any, HFTensor]],
    tensors: Sequence[HFTensor],
) -> dict[str, Any]:
    """adapter_config.json from what is written; patterns name each module whose rank or alpha differs."""
    ranks = {name: pair.lora_a.shape[-1] for name, pair in factors.items()}
    root = lambda rank: math.sqrt(rank) if config.use_rslora else rank
    alphas = {name: pair.scaling * root(ranks[name]) for name, pair in factors.items()}
    biases = [t for t in whole if t.name.endswith(".bias") and module_of(t) in factors]
    others = [t for t in whole if t not in biases]
    only_biases = bool(others) and all(t.name.endswith(".bias") for t in others)
    kernels = [t for e, t in found.values() if isinstance(e, LoraFactors | DoraFactors) and t.path.endswith("/kernel")]
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets_of(list(factors), tensors),
        "lora_dropout": config.lora_dropout,
        "bias": "all" if only_biases else "lora_only" if biases else "none",
        "fan_in_fan_out": bool(kernels) and not any(t.transpose for t in kernels),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None if only_biases else sorted({module_of(t) for t in others}) or None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.r},
        "alpha_pattern": {name: a for name, a in alphas.items() if not math.isclose(a, config.lora_alpha)},
        "use_rslora": config.use_rslora,
        "use_dora": any(isinstance(e, DoraFactors) for e, _ in found.values()),
        "layers_to_transform": None,
    }


def targets_of(names: Sequence[str], tensors: Sequence[HFTensor]) -> list[str]:
    """The adapted modules' last names where those mean no other module, else their whole names."""
    matrices = {module_of(t) for t in tensors if t.path.endswith(("/kernel", "/embedding"))}
    last = {name.rpartition(".")[2] for name in names}
    others = {name for name in matrices - set(names) if name.rpartition(".")[2] in last}
    return sorted(names) if others else sorted(last)


def card_text(base: str, written: Mapping[str, Any], lines: Mapping[str, Any]) -> str:
    """The model card: base, rank, alpha, targets, and the lines given."""
    facts = {
        "base model": base,
        "rank": written["r"],
        "alpha": written["lora_alpha"],
        "adapted": ", ".join(written["target_modules"][:8]),
        **lines,
    }
    body = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    notes = "".join(f"\n{note}\n" for note in refused_by_vllm(written))
    return f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [lora, jlora]\n---\n\n# LoRA adapter\n\n{body}{notes}"


def refused_by_vllm(written: Mapping[str, Any]) -> list[str]:
    """Sentences for what vLLM does not serve as an adapter, with the way out."""
    reasons = {"use_dora": written["use_dora"], "bias": written["bias"] != "none"}
    reasons["modules_to_save"] = bool(written["modules_to_save"])
    merged = "`jlora merge` writes a plain model that it serves"
    said = [f"vLLM refuses adapters with {name}: {merged}." for name, there in reasons.items() if there]
    ranks, alphas = written["rank_pattern"], written["alpha_pattern"]
    root = math.sqrt if written["use_rslora"] else float
    scale = lambda name: alphas.get(name, written["lora_alpha"]) / root(ranks.get(name, written["r"]))
    if not all(math.isclose(scale(name), scale("")) for name in {*ranks, *alphas}):
        said.append(f"vLLM scales all modules alike, by lora_alpha and r, and these differ: {merged}.")
    highest = max([written["r"], *written["rank_pattern"].values()])
    return said + ([f"vLLM needs --max-lora-rank {highest} for this rank."] if highest > 16 else [])


def put_adapter(folder: Path, arrays: dict[str, np.ndarray], card: str, written: Mapping[str, Any]) -> None:
    """The three files of an adapter's folder, complete or as they were."""
    import ml_dtypes  # noqa: F401  (safetensors.numpy writes bfloat16 only once this is imported)
    from safetensors.numpy import save

    folder.mkdir(parents=True, exist_ok=True)
    put_all(
        {
            folder / "adapter_model.safetensors": save(arrays, metadata={"format": "pt"}),
            folder / "README.md": card.encode(),
            folder / "adapter_config.json": (json.dumps(written, indent=2) + "\n").encode(),
        }
    )
