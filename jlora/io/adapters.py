"""An adapter's folder read and written, by whatever method it was trained: in PEFT's format (`io/peft_read.py`,
`io/peft.py`, `io/peft_kin.py`) or the plain one (`io/plain.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from jlora.config import LoraConfig
from jlora.io import peft_kin, plain
from jlora.io.load import Pretrained
from jlora.io.peft import save_peft
from jlora.io.peft_read import adapter_json, load_peft, read_arrays, read_config
from jlora.lora import LoraFactors, Together, is_adapter
from jlora.methods.dora import DoraFactors
from jlora.methods.named import MethodConfig, lora_config, names_of
from jlora.methods.plant import entries_of
from jlora.methods.token_rows import TokenRows

About: TypeAlias = LoraConfig | MethodConfig
"""What an adapter is: LoRA's settings, or a method's by its name."""


PEFT_NAMES = {"IA3": "ia3", "PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix-kv"}
"""Methods that have files of their own in PEFT (`io/peft_kin.py`), by peft_type."""


def about(folder: str | Path) -> About:
    """What the adapter of `folder` is. Raises ValueError for a peft_type that is not read here."""
    held = adapter_json(folder)
    if held.get("peft_type") in PEFT_NAMES:
        return MethodConfig(method=PEFT_NAMES[held["peft_type"]], virtual_tokens=held.get("num_virtual_tokens") or 16)
    if held.get("peft_type") != plain.KIND:
        return read_config(folder)
    where, told = Path(folder) / "adapter_config.json", held.get("settings", {})
    if not isinstance(told, dict):
        raise ValueError(f"{where}: settings is a {type(told).__name__}, not an object")
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(MethodConfig):
        value = told.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        kinds = (int, float) if isinstance(field.default, float) else type(field.default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(field.default, bool)):
            raise ValueError(f"{where}: settings.{field.name} is {value!r:.60}")
        settings[field.name] = value
    names_of(settings["method"])
    return MethodConfig(**settings)


def method_in(folder: str | Path) -> MethodConfig:
    """The adapter of `folder` as a method's settings, as far as its files tell them. Raises what `about` does."""
    what = about(folder)
    if isinstance(what, MethodConfig):
        return what
    method = "dora" if adapter_json(folder).get("use_dora") else "rslora" if what.use_rslora else "lora"
    several = lambda names: (names,) if isinstance(names, str) else tuple(names)
    return MethodConfig(
        method=method if what.bias == "none" else f"{method}+bitfit",
        rank=what.r,
        alpha=what.lora_alpha,
        targets=several(what.target_modules),
        exclude=several(what.exclude_modules),
        dropout=what.lora_dropout,
        rslora=what.use_rslora,
    )


def load_adapter(base: Pretrained, folder: str | Path) -> tuple[Any, Any, Any]:
    """(frozen, trained, what it is): the adapter of `folder`, by whatever method, on `base`.

    A model with a prefix is run by `methods.columns.reading`. Raises ValueError where it does not fit.
    """
    held = adapter_json(folder)
    if held.get("peft_type") == plain.KIND:
        return *plain.load_plain(folder, held, read_arrays(folder), base.params), about(folder)
    if held.get("peft_type") in PEFT_NAMES:
        return *peft_kin.load_kin(folder, held, read_arrays(folder), base), about(folder)
    return load_peft(folder, base.params, base.tensors)


def task_of(model: Any) -> str | None:
    """PEFT's task_type of a model."""
    judges = getattr(model, "head", None) in ("classify", "regress")
    return "CAUSAL_LM" if hasattr(model, "init_cache") else "SEQ_CLS" if judges else None


def peft_form(base: Pretrained, trained: Any) -> str | None:
    """PEFT's peft_type of a file that holds exactly this tree, or None."""
    entries = {} if isinstance(trained, Together) else entries_of(trained)
    adapters = [entry for entry in entries.values() if is_adapter(entry)]
    if adapters and all(isinstance(entry, LoraFactors | DoraFactors | TokenRows) for entry in adapters):
        return "LORA"
    return peft_kin.kind_of(base, trained)


def save_adapter(
    folder: str | Path, base: Pretrained, trained: Any, about: About, *, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a trained tree so that `load_adapter` gives it back bit for bit: in PEFT's format where that is the same
    thing, else in the plain form (`io/plain.py`). Returns the folder.
    """
    form, task, card = peft_form(base, trained), task_of(base.model), card or {}
    if form is None:
        settings = dataclasses.asdict(about)
        return plain.save_plain(folder, trained, base.params, base.source, settings, card, base.revision)
    if form == "LORA":
        config = about if isinstance(about, LoraConfig) else lora_config(about)
        return save_peft(folder, trained, config, base.tensors, base.source, base.revision, task=task, card=card)
    if form == "PROMPT_TUNING" and isinstance(about, MethodConfig) and about.method == "p-tuning":
        form = "P_TUNING"
    return peft_kin.save_kin(folder, base, trained, form, card, task)
