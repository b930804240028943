"""An adapter folder in PEFT's format, put on a loaded model: its own settings, so nothing is typed twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from jlora.config import LoraConfig
from jlora.io.load import Pretrained
from jlora.io.peft import load_peft
from jlora.lora import lorafy


def read_config(folder: str | Path) -> LoraConfig:
    """The `LoraConfig` of adapter_config.json. Raises ValueError for a peft_type or setting that is not LoRA's."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an adapter folder holds it and adapter_model.safetensors")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg} at line {error.lineno}") from None
    if held.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {held.get('peft_type')!r}; this reads 'LORA'")
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"init_lora_weights"}
    return LoraConfig(**{name: held[name] for name in fields & set(held) if held[name] is not None})


def load_adapter(base: Pretrained, folder: str | Path) -> tuple[Any, Any, LoraConfig]:
    """(frozen, lora, config): the adapter of `folder` on `base`. Raises ValueError where it does not fit."""
    config = read_config(folder)
    frozen, lora = lorafy(base.params, config=config, key=jax.random.key(0), layouts=base.layouts)
    return frozen, load_peft(folder, lora, base.tensors), config
