"""`jlora export`: an adapter in the form another program wants."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from jlora.commands.merge import MergeConfig, merge_command, read_base
from jlora.commands.settings import say
from jlora.data.template import template_for, write_template
from jlora.io.adapters import load_adapter, peft_form, save_adapter
from jlora.io.classes import read_classes, write_classes
from jlora.io.gguf_adapter import save_gguf_adapter
from jlora.io.load import hub_id
from jlora.io.peft import refused_by_vllm
from jlora.io.peft_kin import as_keys_and_values
from jlora.io.save import refuse_used
from jlora.lora import Together
from jlora.methods.fused import settle
from jlora.methods.named import MethodConfig
from jlora.methods.plant import entries_of
from jlora.methods.prefix import PrefixLayer


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
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of a merged model's tensors."""
    quantise: Literal["none", "nf4", "int8", "int4"] = "none"
    """Of the base that the adapter was trained on: as it was trained."""


def export_command(config: ExportConfig) -> dict[str, Any]:
    """{output}. Raises ValueError for what the form cannot hold, FileExistsError for a used folder or file."""
    refuse_used(config.output)
    if config.to == "merged":
        how: dict[str, Any] = {"dtype": config.dtype, "quantise": config.quantise}
        return merge_command(MergeConfig(config.model, config.adapter, config.output, **how))
    base, head = read_base(config.model, config.adapter, quantise=config.quantise, weights=config.to == "peft")
    frozen, trained, what = load_adapter(base, config.adapter)
    if isinstance(what, MethodConfig) and what.parts:
        n = what.parts.count("x")
        trained, what = settle(trained), dataclasses.replace(what, rank=n * what.rank, alpha=n * what.alpha, parts="")
        say(f"written as plain LoRA of rank {what.rank}, the same difference: trained on there, B's zeros would move")
    name, revision = hub_id(config.base) if config.base else (base.source, base.revision)
    if config.to == "gguf":
        return {"output": str(save_gguf_adapter(config.output, trained, base.config, base.tensors, name))}
    entries = [] if isinstance(trained, Together) else [*entries_of(trained).values()]
    if entries and all(isinstance(entry, PrefixLayer) for entry in entries):
        trained, what = as_keys_and_values(base, frozen, trained), MethodConfig(method="prefix-kv")
    if peft_form(base, trained) is None:
        method = what.method if isinstance(what, MethodConfig) else "LoRA"
        raise ValueError(
            f"PEFT has no file that is the same as {method}: `--to merged` writes a plain model, if it can"
        )
    folder = save_adapter(config.output, dataclasses.replace(base, source=name, revision=revision), trained, what)
    if head:
        write_classes(folder, read_classes(config.adapter))
    write_template(folder, template_for(None, config.adapter))
    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for note in refused_by_vllm(written) if written["peft_type"] == "LORA" else ():
        say(note)
    return {"output": str(folder)}
