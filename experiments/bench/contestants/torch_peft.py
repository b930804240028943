"""Hugging Face PEFT on torch: eager, or with torch.compile (options compile=1); threads=N."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from experiments.bench.contestants.torch_step import adamw_step


def prepare(case: Any, folder: str, tokens: Any, options: dict[str, str]) -> Any:
    torch.set_num_threads(int(options.get("threads", case.threads)))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=case.rank, lora_alpha=case.alpha, target_modules=list(case.targets), lora_dropout=0.0
    )
    return adamw_step(get_peft_model(base, config), case, tokens, bool(options.get("compile")))
