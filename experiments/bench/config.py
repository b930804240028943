"""What is compared: sizes of the step, contestants, rounds. Everything a figure depends on stands here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step, alike for every contestant: AdamW, float32, every token a label."""

    batch: int = 4
    seq: int = 128
    """Tokens a row."""
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ALL
    learning_rate: float = 1e-3
    threads: int = 2
    """Of torch; XLA takes the machine's."""
    vocab: int = 0
    """Rows of the embedding; 0: the model's own. For the growth with the vocabulary."""
    chunk: int = 512
    """Labels the head takes at a time (jlora)."""
    remat: str = "dots"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A module of `contestants`, the environment it runs in ("" ours) and its options."""

    module: str
    env: str = ""
    options: tuple[str, ...] = ()


CONTESTANTS = {
    "jlora": Contestant("ours"),
    "jlora, all kept": Contestant("ours", options=("remat=none",)),
    "hand-written JAX": Contestant("handwritten"),
    "materialised W + AB": Contestant("materialised"),
    "PEFT": Contestant("torch_peft", "peers"),
    "PEFT, one thread": Contestant("torch_peft", "peers", ("threads=1",)),
    "PEFT, torch.compile": Contestant("torch_peft", "peers", ("compile=1",)),
    "loralib": Contestant("torch_loralib", "peers"),
    "qwix": Contestant("qwix", "peers"),
    "Flax NNX LoRA": Contestant("nnx", "peers"),
    "Quax": Contestant("quax", "peers"),
    "lorax": Contestant("lorax", "lorax"),
}

PEFT = ("PEFT", "PEFT, one thread", "PEFT, torch.compile")
STEP = ("jlora", "hand-written JAX", "materialised W + AB", "qwix", *PEFT)
"""Of the step at equal shapes. On a machine that is not idle torch's threads spin while they wait: there its one-thread
row, in CPU seconds, is the fair one. All are alive at once, two gigabytes each: so the rest are a comparison of their
own."""
MORE = ("jlora", "jlora, all kept", "Flax NNX LoRA", "Quax", "lorax", "loralib")
QV = ("jlora", "hand-written JAX", *PEFT)
"""Of the step with q and v alone."""

ENVIRONMENTS = {
    "peers": ("-e", ".[demo]", "torch==2.13.0", "peft==0.21.2", "accelerate", "qwix==0.1.8", "loralib", "quax"),
    "lorax": (
        "jax-lorax==0.3.1",
        "plum-dispatch<2.5",
        "jax==0.4.28",
        "jaxlib==0.4.28",
        "numpy<2",
        "scipy<1.13",
    ),  # wants a JAX of 2024
}
"""pip's arguments for each virtual environment of peers."""
