"""An AdamW step of a torch model of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def adamw_step(model: Any, case: Any, tokens: np.ndarray, compile_it: bool) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=0.0)
    ids = torch.tensor(tokens, dtype=torch.long)
    # the model shifts labels by itself and leaves the last token out: one label a row fewer than in JAX
    run = torch.compile(model) if compile_it else model

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        return float(loss)

    return step, {"torch": torch.__version__, "trained": sum(p.numel() for p in trained)}
