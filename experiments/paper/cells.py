"""An experiment as cells, each a small result kept in a JSON file, so that a run goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.paper.tables import Shown

Results = dict[str, dict[str, Any]]
"""What cells gave, by their names."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model trained, or one thing measured. `run(results so far)` -> its figures."""

    name: str
    run: Callable[[Results], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or a figure. Cells are in order: one may read what those before it gave."""

    name: str
    title: str
    config: Any
    """The settings of record: a frozen dataclass."""
    small: Any
    """The same settings made small: minutes, to see every line run."""
    cells: Callable[[Any], list[Cell]]
    show: Callable[[Any, Results], Shown]


class Kept:
    """Results in `folder`/NAME.json with the settings they were made by, written beside and renamed.

    Raises ValueError where the file's settings are others.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]):
        self.path, self.settings = folder / f"{name}.json", json.loads(json.dumps(settings))
        self.results: Results = {}
        if self.path.exists():
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["settings"] != self.settings:
                names = sorted({*held["settings"], *self.settings})
                other = {n: (held["settings"].get(n), self.settings.get(n)) for n in names}
                other = {n: pair for n, pair in other.items() if pair[0] != pair[1]}
                raise ValueError(f"{self.path} has other settings (there, here): {other}; give another --output")
            self.results = held["cells"]

    def put(self, name: str, figures: dict[str, Any]) -> None:
        self.results[name] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(written({"settings": self.settings, "cells": self.results}), encoding="utf-8")
        beside.replace(self.path)


def written(value: Any) -> str:
    """JSON, lists of numbers on one line each."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[-\d.,e\s]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


class Budget:
    """Seconds to spend; None: no end."""

    def __init__(self, seconds: float | None):
        self.until = None if seconds is None else time.monotonic() + seconds

    def room_for(self, seconds: float) -> bool:
        return self.until is None or time.monotonic() + seconds <= self.until


def duration(text: str) -> float:
    """Seconds of "8h", "90m", "30s", "1h30m". Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or found is None:
        raise ValueError(f"budget {text!r}: write hours, minutes or seconds, as 8h, 90m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(experiment: Experiment, config: Any, folder: Path, budget: Budget, only: str = "") -> int:
    """Run the cells that are not kept yet and whose name `only` (a regex) finds; how many are left.

    A cell is not begun if those before it say that it would outlast the budget. A file that is not here ends the
    experiment, said in one line.
    """
    kept = Kept(folder, experiment.name, dataclasses.asdict(config))
    cells = [cell for cell in experiment.cells(config) if re.search(only, cell.name)]
    left = [cell for cell in cells if cell.name not in kept.results]
    took = [held["seconds"] for held in kept.results.values()]
    for n, cell in enumerate(left):
        each = statistics.median(took) if took else 0.0
        if not budget.room_for(each):
            say(f"{experiment.name}: the budget ends, {len(left) - n} of {len(cells)} cells are left")
            return len(left) - n
        eta = f", about {clock(each * (len(left) - n))} left" if took else ""
        say(f"{experiment.name} {len(cells) - len(left) + n + 1}/{len(cells)}{eta}: {cell.name}")
        began = time.monotonic()
        try:
            figures = cell.run(kept.results)
        except FileNotFoundError as error:
            say(f"{experiment.name}: left out: {error}")
            return len(left) - n
        took.append(round(time.monotonic() - began, 1))
        kept.put(cell.name, {**figures, "seconds": took[-1]})
        say(f"  {shown(figures)}")
    jax.clear_caches()
    return 0


def shown(figures: dict[str, Any]) -> str:
    """The plain figures of a cell, in a line."""
    plain = {k: v for k, v in figures.items() if isinstance(v, int | float | str)}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())
