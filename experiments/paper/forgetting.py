"""Forgetting and overfitting: full and LoRA fine-tuning of SmolLM2 on few rows, watched as they go on.

    python -m experiments.all forgetting --budget 1h

Watched: loss on the rows it trains on and on held-out ones of the same domain, right answers in another domain, and
perplexity of general text (Wikipedia sentences of QNLI's dev set).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.fits import Fitted, Work
from experiments.paper.tables import Figure, Shown, Table, canvas, mean
from experiments.paper.ways import way
from experiments.paper.works import DECODER, PAPER_TARGETS, folder
from jlora.commands.settings import TrainConfig
from jlora.data import Row, read_rows, split_rows
from jlora.data.files import records


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows are few and passed over often, so that both overfit."""

    methods: tuple[tuple[str, float], ...] = (("lora", 1e-3), ("full", 5e-5))
    """With their rates: those of docs/methods.md's table on these rows."""
    model: str = DECODER
    rows: int = 200
    steps: int = 150
    """Of 8 rows: six passes."""
    at: tuple[int, ...] = (0, 10, 25, 50, 100, 150)
    held: int = 120
    """Rows of each test set."""
    seeds: int = 3


SMALL = Config(rows=16, steps=2, at=(0, 2), held=8, seeds=1)
TRAIN, OTHER = "movie-reviews", "tweets"


def general(count: int) -> list[Row]:
    """Sentences as plain text."""
    sentences = dict.fromkeys(record["sentence"] for _, record in records(folder("glue/QNLI") / "dev.tsv"))
    return [Row(completion=text) for text in sentences if 60 < len(text) < 300][:count]


def work_of(config: Config) -> Work:
    train, held = split_rows(read_rows(f"pip:{TRAIN}"), config.held, 0)
    other = split_rows(read_rows(f"pip:{OTHER}"), config.held, 0)[1]
    settings = TrainConfig(config.model, TRAIN, batch=8, max_length=96, **PAPER_TARGETS[DECODER])
    tests = {"seen": train[: config.held], "held out": held, "other": other, "general": general(config.held)}
    return Work(settings, train[: config.rows], tests)


def cells(config: Config) -> list[Cell]:
    work = functools.lru_cache(1)(functools.partial(work_of, config))

    def watched(method: str, rate: float, seed: int, done: Results) -> dict[str, Any]:
        out: dict[str, list[float]] = {name: [] for name in CURVES}

        def look(step: int, fitted: Fitted) -> None:
            if step not in config.at:
                return
            seen, held, other, text = (fitted.judge(name) for name in ("seen", "held out", "other", "general"))
            out["seen, loss"].append(seen["loss"])
            out["held out, loss"].append(held["loss"])
            out["held out, right"].append(held["first"])
            out["other domain, right"].append(other["first"])
            out["general text, perplexity"].append(math.exp(text["loss"]))

        work().fit(way(DECODER, method), rate=rate, steps=config.steps, seed=seed, after=look)
        return {name: [round(x, 4) for x in values] for name, values in out.items()}

    return [
        Cell(f"{method}/seed {seed}", functools.partial(watched, method, rate, seed))
        for seed in range(config.seeds)
        for method, rate in config.methods
    ]


CURVES = ("seen, loss", "held out, loss", "held out, right", "other domain, right", "general text, perplexity")


def show(config: Config, done: Results) -> Shown:
    methods = [method for method, _ in config.methods if f"{method}/seed 0" in done]
    if not methods:
        return Shown()
    runs = lambda method: [held for name, held in done.items() if name.startswith(f"{method}/")]
    rows = []
    for method in methods:
        for curve in CURVES:
            values = zip(*(run[curve] for run in runs(method)), strict=True)
            rows.append([method, curve, *(f"{mean(at)[0]:.3g}" for at in values), str(len(runs(method)))])
    rates = ", ".join(f"{method} {rate:g}" for method, rate in config.methods)
    passes = f"{8 * config.steps / config.rows:.0f}"
    note = (
        f"SmolLM2 on {config.rows} movie snippets, {config.steps} steps of 8 ({passes} passes), LoRA of r = "
        f"{PAPER_TARGETS[DECODER]['rank']} on {' and '.join(PAPER_TARGETS[DECODER]['targets'])}; rates ({rates}) were "
        f"not searched. Of {config.held} rows or sentences each, means over seeds. `seen`: rows that it trains on; "
        f"`held out`: of the same domain; `other domain`: {OTHER}; `general text`: Wikipedia's, of QNLI."
    )
    table = Table(["method", "figure", *(f"step {at}" for at in config.at), "seeds"], rows, note)
    figure, axes = canvas(1, len(CURVES), (2.4, 2.6))
    losses = [curve for curve in CURVES if curve.endswith("loss")]
    most = max((loss for method in methods for run in runs(method) for c in losses for loss in run[c][1:]), default=1)
    for ax, curve in zip(axes[0], CURVES, strict=True):
        for method, colour in zip(methods, ("#2a6f97", "#bc6c25"), strict=False):
            for run in runs(method):
                ax.plot(config.at, run[curve], color=colour, alpha=0.3, linewidth=1)
            ax.plot(config.at, np.mean([run[curve] for run in runs(method)], 0), color=colour, label=method)
        ax.set(title=curve.replace(", ", ",\n"), xlabel="step")
        if curve in losses:  # both on one scale, cut above what is left after the first look
            ax.set_ylim(0, 1.05 * most)
    axes[0][0].legend(frameon=False)
    start = ", ".join(f"{runs(methods[0])[0][curve][0]:.1f}" for curve in losses)
    caption = f"As training goes on: full and LoRA, seeds (thin) and means; the losses are cut, they start at {start}"
    return Shown([table], [Figure("forgetting", caption, figure)])


EXPERIMENT = Experiment("forgetting", "Forgetting and overfitting", Config(), SMALL, cells, show)
