"""Checkpoints of loralib, the paper's own code: `lora_A` [r, in] and `lora_B` [out, r] beside the module's name.

Its MergedLinear adapts parts of a fused projection (query and value of GPT-2's c_attn): A holds r rows a part, B the
parts' rows one after the other, and each part is multiplied by itself. Here that is one pair of factors of rank
r x parts whose B is zero off the blocks. The scaling alpha / r is not in the files: it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.io.peft import module_of
from jlora.io.peft_read import Part, planted
from jlora.io.tensors import finite
from jlora.io.torchfile import read_bin
from jlora.io.whole import misfit
from jlora.lora import LoraFactors, is_adapter
from jlora.models.tensors import HFTensor
from jlora.tree import path_of, paths


def load_loralib(
    path: str | Path,
    params: Any,
    tensors: Sequence[HFTensor],
    *,
    alpha: float,
    enable: Sequence[bool] | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Any, Any, LoraConfig]:
    """(frozen, lora, config) of a checkpoint, for `params` (arrays, or shapes: then `frozen` holds shapes).

    alpha: the scaling is alpha / r. enable: MergedLinear's parts of the fused output, in order, as (True, False, True).
    Tensors without `lora_` in their name are whole trained leaves.
    Raises ValueError listing tensors that have no place in the model, or whose shape or numbers do not fit it.
    """
    arrays = {name: np.asarray(x) for name, x in read_bin(path).items()}
    by_module = {module_of(t): t for t in tensors if t.name.endswith(".weight")}
    by_name = {t.name: t for t in tensors}
    leaves, parts, full = paths(params), {}, {}
    wrong, ranks = [], set()
    for name, array in arrays.items():
        module, _, kind = name.rpartition(".")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            wrong.append(f"{name} holds {array.dtype}, not floats")
        elif not finite(array):
            wrong.append(f"{name} holds NaN or infinity")
        elif name in by_name:
            wrong += misfit(leaves[by_name[name].path], by_name[name], array)
            full.setdefault(by_name[name].path, []).append((by_name[name], array))
        elif kind not in ("lora_A", "lora_B") or module not in by_module or f"{module}.lora_B" not in arrays:
            wrong.append(f"{name} has no place in the model")
        elif kind == "lora_A":
            tensor = by_module[module]
            shape = tuple(leaves[tensor.path].shape[-2:])
            try:
                a, b, rank = unmerged(array, arrays[f"{module}.lora_B"], shape, enable)
            except ValueError as error:
                wrong.append(f"{module}: {error}")
                continue
            ranks.add(rank)
            parts.setdefault(tensor.path, []).append(Part(tensor.layer, a, b, alpha / rank, None))
    if wrong:
        raise ValueError(f"{path} does not fit the model ({len(wrong)} tensors): {'; '.join(wrong[:6])}")
    if not parts:
        raise ValueError(f"{path} holds no lora_A: it is no loralib checkpoint")
    count = 1 if enable is None else sum(enable)
    rank = max(ranks) * count
    names = {module_of(t) for found in full.values() for t, _ in found}
    config = LoraConfig(r=rank, lora_alpha=alpha * count, modules_to_save=sorted(names))
    return *planted(params, parts, full, dtype), config


def unmerged(
    a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], enable: Sequence[bool] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """(A [in, r'], B [r', out], r) of one module; r' = r, or r x enabled parts. Raises ValueError for other shapes."""
    rows, out = shape
    if not a.ndim == b.ndim == 2:
        raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} are not two matrices")
    if enable is None:
        if a.shape[1] != rows or b.shape != (out, a.shape[0]):
            fused = "" if b.shape[0] == out else "; a fused projection needs enable="
            raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} for a weight [in, out] = {list(shape)}{fused}")
        return a.T, b.T, a.shape[0]
    count, width = sum(enable), out // len(enable)
    rank = a.shape[0] // count
    if a.shape != (rank * count, rows) or b.shape != (width * count, rank):
        raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} are not {count} parts of [in, out] = {list(shape)}")
    whole = np.zeros((rank * count, out), b.dtype)
    for n, slot in enumerate(np.flatnonzero(enable)):
        whole[n * rank : (n + 1) * rank, slot * width : (slot + 1) * width] = b[n * width : (n + 1) * width].T
    return a.T, whole, rank


def loralib_arrays(
    lora: Any, tensors: Sequence[HFTensor], enable: Sequence[bool] | None = None
) -> dict[str, np.ndarray]:
    """The trained tree as loralib names and shapes it; `torch.save` of these (as tensors) is its checkpoint.

    Raises ValueError for an entry that is not LoRA, or with `enable` a B that is not zero off its blocks.
    """
    held = {path_of(keys): e for keys, e in jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_adapter)[0]}
    out: dict[str, np.ndarray] = {}
    for tensor in (t for t in tensors if t.path in held):
        entry = held[tensor.path]
        row = lambda x, layer=tensor.layer: np.asarray(x if layer is None else x[layer])
        if not is_adapter(entry):
            out[tensor.name] = row(entry).T if tensor.transpose else row(entry)
            continue
        if not isinstance(entry, LoraFactors):
            raise ValueError(f"loralib has no place for {tensor.path}: {type(entry).__name__} is not LoRA")
        a, b = row(entry.lora_a).T, row(entry.lora_b)
        if enable is not None:
            count, width = sum(enable), b.shape[1] // len(enable)
            rank = b.shape[0] // count
            slots = np.flatnonzero(enable)
            blocks = [b[n * rank : (n + 1) * rank, s * width : (s + 1) * width].T for n, s in enumerate(slots)]
            if np.count_nonzero(b) != sum(map(np.count_nonzero, blocks)):
                raise ValueError(f"{tensor.path}: B is not zero off the blocks of {tuple(enable)}")
            b = np.concatenate(blocks).T
        out[f"{module_of(tensor)}.lora_A"], out[f"{module_of(tensor)}.lora_B"] = a, b.T
    return out
