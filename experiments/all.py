"""Every table and figure of the paper that this machine can hold, cell by cell.

python -m experiments.all --budget 8h                     # goes on from experiments/results
python -m experiments.all glue few --budget 90m
python -m experiments.all --small --output build/small    # every line once, in minutes
python -m experiments.report                              # tables, figures and pages of what is there
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import tyro

from experiments.paper.cells import Budget, Experiment, duration, run

NAMES = ("released", "cost", "why", "glue", "which", "few", "combined", "domains", "forgetting", "preference")
NAMES += ("shots", "quantised", "latency", "dimension", "e2e")
"""Modules of experiments.paper, the cheap and telling ones first."""
RESULTS = Path(__file__).parent / "results"


def experiment(name: str) -> Experiment:
    return importlib.import_module(f"experiments.paper.{name}").EXPERIMENT


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run."""

    names: tyro.conf.Positional[tuple[str, ...]] = NAMES
    budget: str = ""
    """Time to spend, as 8h or 90m; all that is left, if not given."""
    output: Path = RESULTS
    small: bool = False
    """The small settings, to see that every line runs; give another --output."""
    only: str = ""
    """Cells whose name this regex finds."""


def main(config: Config) -> None:
    """Run what is not kept yet. Raises ValueError for an unknown name."""
    wrong = [name for name in config.names if name not in NAMES]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no experiment: {', '.join(NAMES)}")
    if config.small and config.output == RESULTS:
        raise ValueError("small settings are not of record: give another --output")
    budget = Budget(duration(config.budget) if config.budget else None)
    for name in config.names:
        one = experiment(name)
        run(one, one.small if config.small else one.config, config.output, budget, config.only)


if __name__ == "__main__":
    main(tyro.cli(Config))
