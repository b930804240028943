"""loralib, the LoRA authors' package: its Linear put by hand in place of the model's."""

from __future__ import annotations

from typing import Any

import loralib
import torch
from transformers import AutoModelForCausalLM

from experiments.bench.contestants.torch_step import adamw_step


def prepare(case: Any, folder: str, tokens: Any, options: dict[str, str]) -> Any:
    torch.set_num_threads(case.threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in list(model.modules()):
        for name, old in list(module.named_children()):
            if name in case.targets:
                new = loralib.Linear(old.in_features, old.out_features, r=case.rank, lora_alpha=case.alpha, bias=False)
                new.weight.data = old.weight.data
                setattr(module, name, new)
    loralib.mark_only_lora_as_trainable(model)
    model.train()
    return adamw_step(model, case, tokens, False)
