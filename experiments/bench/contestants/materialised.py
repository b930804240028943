"""The same model, loss and step on W + scaling * A·B, built each step: what LoRA costs where it is not factored."""

from __future__ import annotations

from typing import Any

import jlora
from experiments.bench.contestants import ours


def prepare(case: Any, folder: str, tokens: Any, options: dict[str, str]) -> Any:
    return ours.prepare(case, folder, tokens, options, attach=jlora.merge)
