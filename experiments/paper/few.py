"""Few examples (the paper's MNLI-100, 1k, 10k): MiniLM on SST-2 with the first so many of its rows.

python -m experiments.all few --budget 1h
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.chosen import of, tuned
from experiments.paper.tables import Shown, Table, cell
from experiments.paper.ways import rates_of, way
from experiments.paper.works import ENCODER, glue

NAMES = {"lora": "LoRA", "full": "full", "prompt": "prefix-embedding", "prefix": "prefix-layer"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The rate is chosen for each method and number of rows, on rows that are in none of them."""

    task: str = "SST-2"
    rows: tuple[int, ...] = (100, 1000, 10000)
    steps: tuple[int, ...] = (100, 200, 400)
    rates: tuple[tuple[str, tuple[float, ...]], ...] = rates_of(*NAMES)
    """A method's."""
    seeds: int = 3


SMALL = Config(rows=(32,), steps=(3,), rates=rates_of("lora", "prompt"), seeds=1)


def cells(config: Config) -> list[Cell]:
    work = functools.lru_cache(1)(functools.partial(glue, config.task))

    def fit(method: str, rows: int, steps: int, rate: float, seed: int, test: str) -> dict[str, Any]:
        fitted = work().fit(way(ENCODER, method), rate=rate, steps=steps, seed=seed, rows=rows)
        return {"score": fitted.judge(test)["accuracy"], "trained": fitted.count}

    return [
        one
        for rows, steps in zip(config.rows, config.steps, strict=True)
        for method, rates in config.rates
        for one in tuned(f"{rows}/{method}", rates, config.seeds, functools.partial(fit, method, rows, steps))
    ]


def show(config: Config, done: Results) -> Shown:
    rows = [
        [NAMES[method], *(cell(of(done, f"{count}/{method}")) for count in config.rows)] for method, _ in config.rates
    ]
    note = (
        f"MiniLM on {config.task} dev, accuracy x 100 (chance about 50), mean ± half the 95 % interval over seeds (how "
        f"many); {', '.join(map(str, config.steps))} steps of 16. The rows are the first so many, the same for every "
        "seed: ± is of initialisation and order alone, not of which rows are drawn. Rates are searched for each method "
        "and number of rows, on rows that are in none of them."
    )
    return Shown([Table(["method", *(f"{count:,} rows" for count in config.rows)], rows, note)])


EXPERIMENT = Experiment("few", "Few examples", Config(), SMALL, cells, show)
