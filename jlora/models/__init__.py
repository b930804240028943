"""Models in Flax Linen, no word of LoRA in them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jlora.models.tensors import HFTensor

LLAMA = ("jlora.models.llama", "LlamaConfig", "Llama")
BERT = ("jlora.models.bert", "BertConfig", "Bert")
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "bert": BERT, "roberta": BERT}
FAMILIES |= {"gpt2": ("jlora.models.gpt2", "GPT2Config", "GPT2")}
FAMILIES |= {"gemma3_text": ("jlora.models.gemma", "GemmaConfig", "Gemma")}
FAMILIES |= {"deberta-v2": ("jlora.models.deberta", "DebertaConfig", "Deberta")}
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "gpt2": "transformer.", "deberta-v2": "deberta."}
"""Of a base model's tensors on the Hub, where it is not "model."."""


class Family(NamedTuple):
    """What one family's module offers."""

    config: Any
    model: Any
    hf_tensors: Callable[..., list[HFTensor]]
    unread: Callable[..., list[str]] | None
    """(config, names in the checkpoint) -> those that may be there unread; None: there are none."""
    prefix: str
    """Of the base model's tensors, in a checkpoint of the model with a head."""


def family(model_type: str) -> Family:
    """The family of a config.json's `model_type`, imported on first use. Raises ValueError if it is not known."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    where, config, model = FAMILIES[model_type]
    module = importlib.import_module(where)
    unread, prefix = getattr(module, "unread", None), PREFIXES.get(model_type, "model.")
    return Family(getattr(module, config), getattr(module, model), module.hf_tensors, unread, prefix)
