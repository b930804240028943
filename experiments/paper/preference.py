"""DPO on preferences made from human ratings: of two movie snippets, the one that people rated higher is praise.

python -m experiments.all preference --budget 30m
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.fits import Work
from experiments.paper.tables import Shown, Table, cell
from experiments.paper.works import DECODER, PAPER_TARGETS
from jlora.commands.settings import TrainConfig
from jlora.data import Row, parse_snippets, split_rows
from jlora.io.pypi import pip_file
from jlora.io.pypi import snippets as file_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Pairs of one rated at least `least` and one at most -`least`, on a scale from -4 to 4."""

    model: str = DECODER
    pairs: int = 400
    held: int = 100
    least: float = 2.0
    beta: float = 0.1
    rate: float = 5e-4
    steps: int = 60
    """Of 4 pairs."""
    seeds: int = 3


SMALL = Config(pairs=12, held=4, steps=2, seeds=1)


def pairs(config: Config) -> list[Row]:
    """Rows of prompt, chosen and rejected."""
    rated = parse_snippets(pip_file(file_of("movieReviewSnippets")))
    good = [text for rating, text in rated if rating >= config.least]
    bad = [text for rating, text in rated if rating <= -config.least]
    draw = random.Random(0)
    draw.shuffle(good)
    draw.shuffle(bad)
    both = list(zip(good, bad, strict=False))[: config.pairs + config.held]
    return [Row("A review that praises the film:", f" {a}", rejected=f" {b}") for a, b in both]


def cells(config: Config) -> list[Cell]:
    @functools.lru_cache(1)
    def work() -> Work:
        train, held = split_rows(pairs(config), config.held, 0)
        settings = TrainConfig(
            config.model,
            "pairs",
            batch=4,
            max_length=96,
            loss="dpo",
            beta=config.beta,
            **PAPER_TARGETS[DECODER],
        )
        return Work(settings, train, {"held out": held})

    def fit(seed: int, done: Results) -> dict[str, Any]:
        seen: dict[str, float] = {}

        def look(step: int, fitted: Any) -> None:
            if step == 1:
                seen.update(fitted.judge("held out"))

        fitted = work().fit({}, rate=config.rate, steps=config.steps, seed=seed, after=look)
        after = fitted.judge("held out")
        return {"early": seen["accuracy"], "score": after["accuracy"], "loss": after["loss"]}

    return [Cell(f"dpo/seed {seed}", functools.partial(fit, seed)) for seed in range(config.seeds)]


def show(config: Config, done: Results) -> Shown:
    held = [done[f"dpo/seed {seed}"] for seed in range(config.seeds) if f"dpo/seed {seed}" in done]
    if not held:
        return Shown()
    row = [cell([one[key] for one in held]) for key in ("early", "score")] + [
        cell([one["loss"] for one in held], 1.0, 3)
    ]
    note = (
        f"{config.held} held-out pairs: how often the chosen one gains more over the base than the rejected one, x 100 "
        "(50 by chance; DPO's loss is 0.693 at the start); mean ± half the 95 % interval over seeds (how many)."
    )
    return Shown([Table(["right after 1 step", f"after {config.steps}", "loss after"], [row], note)])


EXPERIMENT = Experiment("preference", "DPO on human ratings", Config(), SMALL, cells, show)
