"""`jlora export`: an adapter in the form another program wants."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jlora.commands.merge import MergeConfig, merge_command
from jlora.commands.settings import say
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.io.gguf_adapter import save_gguf_adapter
from jlora.io.peft import refused_by_vllm, save_peft


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write an adapter for another program: PEFT (vLLM, transformers), a merged model, or GGUF (llama.cpp)."""

    model: str
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    adapter: str
    """Folder of the adapter."""
    output: str
    """Folder (peft, merged) or file (gguf)."""
    to: Literal["peft", "merged", "gguf"] = "peft"
    base: str | None = None
    """The base's name to write down, as its Hub id; what `model` says if not given."""


def export_command(config: ExportConfig) -> dict[str, Any]:
    """{output}. Raises ValueError for what the form cannot hold."""
    if config.to == "merged":
        return merge_command(MergeConfig(config.model, config.adapter, config.output))
    base = load(config.model, weights=config.to == "peft")
    _, lora, settings = load_adapter(base, config.adapter)
    name = config.base or config.model
    if config.to == "gguf":
        return {"output": str(save_gguf_adapter(config.output, lora, base.config, base.tensors, name))}
    folder = save_peft(config.output, lora, settings, base.tensors, name)
    import json

    for note in refused_by_vllm(json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))):
        say(note)
    return {"output": str(folder)}
