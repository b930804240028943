"""What an experiment shows: tables and figures, and the mean of several seeds with its interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are text; `note` says what they are and of what."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"{self.note}\n\n{table}" if self.note else table


@dataclasses.dataclass(frozen=True)
class Figure:
    """A matplotlib figure under a file's name, with its caption."""

    name: str
    caption: str
    drawn: Any


@dataclasses.dataclass(frozen=True)
class Shown:
    """Of one experiment. text: what it means, before the tables."""

    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    text: str = ""


def mean(values: Iterable[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t; nan for fewer than two)."""
    from scipy import stats

    x = np.asarray(list(values), float)
    if len(x) < 2:
        return float(x.mean()) if len(x) else float("nan"), float("nan")
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))


def cell(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """ "71.2 ± 1.4 (3)": mean, interval and how many; "" for none."""
    if not values:
        return ""
    middle, half = (scale * x for x in mean(values))
    spread = "" if np.isnan(half) else f" ± {half:.{digits}f}"
    return f"{middle:.{digits}f}{spread} ({len(values)})"


def canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] = (3.2, 2.8)) -> tuple[Any, Any]:
    """(figure, axes [rows, columns]) without a window. Raises ImportError without matplotlib."""
    import matplotlib.figure as mpl

    figure = mpl.Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", dpi=80)
    return figure, figure.subplots(rows, columns, squeeze=False)
