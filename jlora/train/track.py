"""Figures to a tracker beside metrics.jsonl: tensorboardX, Weights & Biases or trackio, behind one small interface."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.io.beside import put
from jlora.train.metrics import needs

RUN_ID = "track.id"
"""In a run's folder."""
Write = Callable[[str, int, dict[str, float]], None]
"""f("train" or "eval", step, figures)."""


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Where a run's figures go: `write` as they come, `close` at the end."""

    write: Write
    close: Callable[[], None]


def tensorboard(folder: Path, settings: dict[str, Any], step: int) -> Tracker:
    """Event files in `folder`/tensorboard; what a resumed run repeats, and all of an earlier run's, is purged."""
    made = needs("tensorboardX", "tensorboardX", "--track tensorboard")
    writer = made.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)
    if not step:
        writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def write(kind: str, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(f"{kind}/{name}", value, step)

    return Tracker(write, writer.close)


def by_run(package: str, folder: Path, settings: dict[str, Any], step: int) -> Tracker:
    """wandb, or trackio, which has the same calls; the project is `jlora`, or what the package's own variables say."""
    made = needs(package, package, f"--track {package}")
    name, own = Path(settings.get("output", folder)).absolute().name, run_id(folder, step)
    if package == "wandb":
        made.init(project="jlora", name=name, id=own, dir=str(folder), config=settings, resume="allow")
    else:  # which knows a run by its name
        made.init(project="jlora", name=f"{name}-{own}", config=settings, resume="allow")
    write = lambda kind, step, figures: made.log({f"{kind}/{n}": x for n, x in figures.items()}, step=step)
    return Tracker(write, made.finish)


def run_id(folder: Path, step: int) -> str:
    """What tells the run of this folder from others of its name: a fresh id, where it goes on the one that it has."""
    path = folder / RUN_ID
    if not step or not path.is_file():
        put(path, uuid.uuid4().hex[:12].encode())
    return path.read_text(encoding="utf-8")


MAKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": lambda *args: by_run("wandb", *args),
    "trackio": lambda *args: by_run("trackio", *args),
}


def make_tracker(names: tuple[str, ...], folder: Path, settings: dict[str, Any], step: int = 0) -> Tracker:
    """All of the trackers named as one; a run that goes on does so at `step`. Figures that are not finite are left out.

    Raises ValueError for an unknown name, ImportError naming the package that is not there.
    """
    for name in names:
        if name not in MAKERS:
            raise ValueError(f"tracker {name!r} is not known: {', '.join(MAKERS)} are")
    made = [MAKERS[name](folder, settings, step) for name in names]

    def write(kind: str, step: int, figures: dict[str, Any]) -> None:
        shown = {name: float(x) for name, x in figures.items() if isinstance(x, int | float) and math.isfinite(x)}
        for tracker in made:
            tracker.write(kind, step, shown)

    def close() -> None:
        for tracker in made:
            tracker.close()

    return Tracker(write, close)
