"""The models and rows at hand: GLUE on MiniLM, snippets and tables-to-text on SmolLM2.

Files lie below $JLORA_SHARED/data (by default ../shared/data): glue/RTE/train.tsv, e2e/devset.csv and so on.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.paper.fits import Work
from jlora.commands.settings import TrainConfig
from jlora.data import Columns, Row, read_rows, split_rows

ENCODER, DECODER = "all-minilm-l6-v2", "smollm2-135m-instruct"


def folder(name: str) -> Path:
    """A folder of data. Raises FileNotFoundError saying how to name it."""
    found = Path(os.environ.get("JLORA_SHARED", "../shared")) / "data" / name
    if not found.is_dir():
        raise FileNotFoundError(f"no folder {found}: set JLORA_SHARED to the folder that holds data/{name}")
    return found


@dataclasses.dataclass(frozen=True)
class Glue:
    """A task's columns and the figure that the paper reports. length: tokens; longer rows are cut."""

    metric: str = "accuracy"
    columns: tuple[str, ...] = ()
    header: bool = True
    length: int = 96


GLUE = {
    "SST-2": Glue(length=48),
    "CoLA": Glue("matthews", ("label=2", "text=4"), header=False, length=48),
    "MRPC": Glue(columns=("label=Quality", "sentence1=#1 String", "sentence2=#2 String")),
    "RTE": Glue(length=128),
    "STS-B": Glue("pearson", ("label=score",)),
    "WNLI": Glue(),
    "QNLI": Glue(length=96),
}


def glue_rows(task: str, part: str) -> list[Row]:
    """`part`: train or dev. QNLI has no train set here: halves of dev stand for both."""
    about, name = GLUE[task], "dev" if task == "QNLI" else part
    columns = Columns(about.columns, label=True, header=about.header)
    rows = read_rows(folder(f"glue/{task}") / f"{name}.tsv", columns=columns)
    if task != "QNLI":
        return rows
    halves = split_rows(rows, len(rows) // 2, 0)
    return halves[part == "dev"]


def glue(task: str, *, batch: int = 16, limit: int = 10_000, split: int = 500) -> Work:
    """MiniLM on a task. Tests: "split", rows held out of train (at most `split` of them, at most a fifth), and "dev".

    limit: training rows at most, at random: no more are read in so few steps.
    """
    train = glue_rows(task, "train")
    train, held = split_rows(train, min(split, len(train) // 5), 0)
    labels = "numbers" if GLUE[task].metric == "pearson" else "classes"
    config = TrainConfig(ENCODER, task, batch=batch, max_length=GLUE[task].length, labels=labels, remat="none")
    return Work(config, train[:limit], {"split": held, "dev": glue_rows(task, "dev")})


def snippets(train: str, tests: Sequence[str] = (), *, batch: int = 8, held: int = 200, length: int = 64) -> Work:
    """SmolLM2 on rated snippets of one domain; tests: `held` rows of each of `tests` and of its own."""
    sets = {}
    for domain in dict.fromkeys([train, *tests]):
        sets[domain] = split_rows(read_rows(f"pip:{domain}"), held, 0)
    config = TrainConfig(DECODER, train, batch=batch, max_length=length, **PAPER_TARGETS[DECODER])
    return Work(config, sets[train][0], {domain: pair[1] for domain, pair in sets.items()})


PAPER_TARGETS: dict[str, dict[str, Any]] = {
    ENCODER: {"targets": ("query", "value"), "rank": 8, "alpha": 8.0},
    DECODER: {"targets": ("q_proj", "v_proj"), "rank": 8, "alpha": 16.0},
}
"""LoRA as in the paper: on the query's and the value's weight."""
