"""Tables 5 and 6: which weights to adapt under one budget, and how small the rank may be. MiniLM on SST-2.

python -m experiments.all which --budget 1h
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.chosen import of
from experiments.paper.tables import Shown, Table, cell
from experiments.paper.works import GLUE, glue

WEIGHTS = {"q": "query", "k": "key", "v": "value", "o": "attention/output/dense"}
BUDGET = (("q", 8), ("k", 8), ("v", 8), ("o", 8), ("qk", 4), ("qv", 4), ("qkvo", 2))
"""Table 5: as many numbers in each."""
RANKS = tuple((weights, rank) for weights in ("q", "qv", "qkvo") for rank in (1, 2, 4, 8, 64))
"""Table 6."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One rate for all, as alpha / r keeps the scale of the update (the paper fixes alpha)."""

    task: str = "SST-2"
    steps: int = 300
    rate: float = 3e-3
    alpha: float = 8.0
    seeds: int = 3
    cases: tuple[tuple[str, int], ...] = tuple(dict.fromkeys(BUDGET + RANKS))


SMALL = Config(steps=3, seeds=1, cases=(("qkvo", 2), ("q", 8)))


def cells(config: Config) -> list[Cell]:
    work = functools.lru_cache(1)(functools.partial(glue, config.task))

    def fit(weights: str, rank: int, seed: int, done: Results) -> dict[str, Any]:
        settings = {"targets": tuple(WEIGHTS[w] for w in weights), "rank": rank, "alpha": config.alpha}
        fitted = work().fit(settings, rate=config.rate, steps=config.steps, seed=seed)
        return {"score": fitted.judge("dev")[GLUE[config.task].metric], "trained": fitted.count}

    return [
        Cell(f"{weights} r={rank}/seed {seed}", functools.partial(fit, weights, rank, seed))
        for seed in range(config.seeds)
        for weights, rank in config.cases
    ]


def show(config: Config, done: Results) -> Shown:
    named = ", ".join
    first = []
    for weights, rank in BUDGET:
        count = of(done, f"{weights} r={rank}", "trained")
        size = f"{int(count[0]):,}" if count else ""
        first.append([named(weights), str(rank), size, cell(of(done, f"{weights} r={rank}"))])
    ranks = list(dict.fromkeys(rank for _, rank in RANKS))
    second = [
        [named(weights), *(cell(of(done, f"{weights} r={rank}")) for rank in ranks)]
        for weights in dict.fromkeys(weights for weights, _ in RANKS)
    ]
    note = (
        f"MiniLM on {config.task} dev, accuracy x 100, mean ± half the 95 % interval over seeds (how many); "
        f"{config.steps} steps of 16 at one rate, {config.rate:g}, that was not searched."
    )
    stuck = [
        f"{named(weights)} at r = {rank} ({100 * score:.1f})"
        for weights, rank in config.cases
        for score in of(done, f"{weights} r={rank}")
        if score < 0.55
    ]
    note += f" A seed that stayed near chance: {'; '.join(stuck)}." if stuck else ""
    return Shown(
        [
            Table(["weights", "rank", "trained", config.task], first, f"One budget. {note}"),
            Table(["weights", *(f"r = {rank}" for rank in ranks)], second, f"Ranks. {note}"),
        ]
    )


EXPERIMENT = Experiment("which", "Tables 5 and 6: which weights, which rank", Config(), SMALL, cells, show)
