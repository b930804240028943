"""One base, four adapters, one a domain rated by people: every adapter on every domain, and all four mixed.

    python -m experiments.all domains --budget 1h

Adapters are trained by `jlora train` under runs/domains (`experiments/serving/domains.py`, which serves them too).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.tables import Shown, Table
from experiments.serving.domains import config_of, crossed
from jlora.commands.mix import MixConfig, mix_command
from jlora.commands.train import train
from jlora.data import DOMAINS

MIXES = {"sum": ("linear", 1.0), "mean": ("linear", 0.25), "ties": ("ties", 1.0)}
"""Method and each adapter's weight."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings are those of experiments/domains.yaml."""

    steps: int = 80
    rows: int = 200
    """Held-out rows a domain."""
    folder: str = "runs/domains"


SMALL = Config(steps=2, rows=8, folder="build/small-domains")


def cells(config: Config) -> list[Cell]:
    place = Path(config.folder)
    configs = {domain: config_of(domain, place, config.steps) for domain in DOMAINS}
    adapters = [place / domain / "adapter" for domain in DOMAINS]

    def trained(domain: str, done: Results) -> dict[str, Any]:
        if not (place / domain / "adapter" / "adapter_config.json").exists():
            train(dataclasses.replace(configs[domain], resume=(place / domain / "checkpoints").exists()))
        return {"trained": domain}

    def table(done: Results) -> dict[str, Any]:
        for name, (method, weight) in MIXES.items():
            words = tuple(f"{folder}:{weight}" for folder in adapters)
            mix_command(MixConfig(words, str(place / name / "adapter"), method))  # pyright: ignore[reportArgumentType]
        return crossed(configs, config.rows, place / "table.json", {n: place / n / "adapter" for n in MIXES})

    named = [Cell(f"train {domain}", functools.partial(trained, domain)) for domain in DOMAINS]
    return [*named, Cell("every adapter on every domain", table)]


def show(config: Config, done: Results) -> Shown:
    held = done.get("every adapter on every domain")
    if not held:
        return Shown()
    rows = []
    for name in ("none", *DOMAINS, *MIXES):
        label = f"mixed: {name}" if name in MIXES else name
        rows.append([label, *(f"{100 * held[name][domain]['first']:.1f}" for domain in DOMAINS)])
    how = config_of(next(iter(DOMAINS)), Path(config.folder), config.steps)
    note = (
        f"SmolLM2 with LoRA of r = {how.rank} on {', '.join(how.targets)}: right words x 100 on {config.rows} held-out "
        f"rows a domain; a row an adapter, a column a domain; one seed, {how.steps} steps of {how.batch} at one rate, "
        f"{how.learning_rate:g}, that was not searched."
    )
    return Shown([Table(["adapter", *DOMAINS], rows, note)])


EXPERIMENT = Experiment("domains", "Four domains, one base", Config(), SMALL, cells, show)
