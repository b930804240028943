"""Ways to fine-tune at matched budgets, each with the learning rates that are tried."""

from __future__ import annotations

from typing import Any

from experiments.methods import SIZES
from experiments.paper.works import DECODER, ENCODER, PAPER_TARGETS

RATES = {
    "full": (3e-5, 1e-4, 3e-4),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "prefix": (3e-3, 1e-2, 3e-2),
    "prompt": (3e-3, 1e-2, 3e-2),
    "intrinsic": (1e-1, 3e-1, 1.0),
}
"""The rest have `USUAL`."""
USUAL = (1e-3, 3e-3, 1e-2)
TASK = {ENCODER: "sst2", DECODER: "snippets"}


def way(model: str, method: str) -> dict[str, Any]:
    """The settings of a method whose size is nearest to LoRA's of rank 8 on the query's and the value's weight."""
    return {**PAPER_TARGETS[model], "method": method, **SIZES[TASK[model]].get(method, {})}


def rates_of(*methods: str, **others: tuple[float, ...]) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """((method, the rates that are tried), ...). others: those of a method where they differ here."""
    return tuple((method, others.get(method) or RATES.get(method, USUAL)) for method in methods)
