"""PEFT's files of a table of words that is the model's head too.

Here the two are one leaf, adapted wherever it is used. PEFT adapts the table alone, and its head stays as it was,
unless `ensure_weight_tying` is set: the file then holds the same numbers once more under the head's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.models.tensors import HFTensor

HEAD = "lm_head."
TABLES = ("embed_tokens.weight", "wte.weight")
SAME = {"weight": "weight", "lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
"""The head's tensors by the table's that they equal; factors change places and are transposed."""


def table_of(tensors: Sequence[HFTensor]) -> str:
    """The module of a table that is the head too, as "model.embed_tokens."; "" where there is none."""
    names = {tensor.name for tensor in tensors}
    table = next((name for name in names if name.endswith(TABLES)), "")
    return "" if f"{HEAD}weight" in names else table.removesuffix("weight")


def copies(arrays: Mapping[str, np.ndarray], tensors: Sequence[HFTensor]) -> dict[str, np.ndarray]:
    """What the file has to hold of the head besides, if it adapts a table that is the head too."""
    table = table_of(tensors)
    turned = lambda key, x: x if key == "weight" else np.ascontiguousarray(x.T)
    own = {key: arrays[table + other] for key, other in SAME.items() if table and table + other in arrays}
    return {HEAD + key: turned(key, x) for key, x in own.items()}


def without_copies(
    arrays: dict[str, np.ndarray], tensors: Sequence[HFTensor], settings: Mapping[str, Any], where: Any
) -> dict[str, np.ndarray]:
    """The file's tensors without those of the head that repeat the table's.

    Raises ValueError where only one of the two was adapted, as the model has one weight for both.
    """
    table = table_of(tensors)
    name = table.removesuffix(".")
    saved = settings.get("modules_to_save") or []
    whole = isinstance(saved, list) and any(f".{name}".endswith(f".{module}") for module in saved)
    adapted = f"{table}lora_embedding_A" in arrays or (whole and f"{table}weight" in arrays)
    if table and adapted and not settings.get("ensure_weight_tying"):
        raise ValueError(
            f"{where}: {name} is the head of this model too, and PEFT adapted it as the table alone: train with "
            "ensure_weight_tying=True, or leave it out"
        )
    same = copies(arrays, tensors)
    twice = {key for key, x in same.items() if key in arrays and np.array_equal(arrays[key], x)}
    return {key: x for key, x in arrays.items() if key not in twice}
