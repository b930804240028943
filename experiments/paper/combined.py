"""LoRA combined with prefixes (appendix E): MiniLM on two tasks.

python -m experiments.all combined --budget 1h
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.chosen import of, tuned
from experiments.paper.tables import Shown, Table, cell
from experiments.paper.ways import way
from experiments.paper.works import ENCODER, GLUE, glue

NAMES = {"lora": "LoRA", "prompt": "PreEmbed", "prefix": "PreLayer"}
NAMES |= {"lora+prompt": "LoRA + PreEmbed", "lora+prefix": "LoRA + PreLayer"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes are those of experiments/methods.py: the sums are about as large as LoRA alone."""

    tasks: tuple[tuple[str, int], ...] = (("SST-2", 200), ("MRPC", 200))
    methods: tuple[str, ...] = tuple(NAMES)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """One grid for all: a sum has one rate."""
    seeds: int = 3


SMALL = Config(tasks=(("CoLA", 3),), methods=("lora+prompt", "lora+prefix"), seeds=1)


def cells(config: Config) -> list[Cell]:
    works = functools.lru_cache(1)(glue)

    def fit(task: str, steps: int, method: str, rate: float, seed: int, test: str) -> dict[str, Any]:
        fitted = works(task).fit(way(ENCODER, method), rate=rate, steps=steps, seed=seed)
        return {"score": fitted.judge(test)[GLUE[task].metric], "trained": fitted.count}

    return [
        one
        for task, steps in config.tasks
        for method in config.methods
        for one in tuned(f"{task}/{method}", config.rates, config.seeds, functools.partial(fit, task, steps, method))
    ]


def show(config: Config, done: Results) -> Shown:
    rows = []
    for method in config.methods:
        sizes = [int(n) for task, _ in config.tasks for n in of(done, f"{task}/{method}", "trained")]
        found = [cell(of(done, f"{task}/{method}")) for task, _ in config.tasks]
        rows.append([NAMES[method], f"{sizes[0]:,}" if sizes else "", *found])
    steps = ", ".join(f"{task} {count} steps" for task, count in config.tasks)
    rates = ", ".join(f"{rate:g}" for rate in config.rates)
    note = (
        f"MiniLM on dev, accuracy x 100, mean ± half the 95 % interval over seeds (how many); {steps} of 16. Rates are "
        f"searched for each method and task on rows held out of train, all on one grid ({rates}, and one step beyond "
        "an end that is best); a sum has one rate for both of its parts."
    )
    return Shown([Table(["method", "trained", *(task for task, _ in config.tasks)], rows, note)])


EXPERIMENT = Experiment("combined", "LoRA with prefixes", Config(), SMALL, cells, show)
