"""`jlora sweep`: several adapters trained in one program over one base: a grid of ranks, rates, seeds and data sets."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from jlora.commands.folder import empty, refuse_used
from jlora.commands.parts import keeper, made_by, rates
from jlora.commands.report import write_json
from jlora.commands.settings import TrainConfig, as_field, check, save_settings, say
from jlora.commands.tasks import Answers, task_of
from jlora.commands.train import rows_to_use
from jlora.data import BatchSource
from jlora.io import Pretrained
from jlora.train import Sums, evaluate, make_eval_step, make_optimiser
from jlora.train.loop import Interrupted, fit, means
from jlora.train.report import Metrics, Reporter
from jlora.train.sweep import SweepSource, init_sweep, make_sweep_step, stack

GRID = ("rank", "alpha", "rslora", "init", "learning_rate", "seed", "data")
"""Settings that may differ between adapters of one program."""


@dataclasses.dataclass(frozen=True)
class SweepConfig(TrainConfig):
    """Train several adapters in one program over one base, from a grid of settings."""

    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE each, of rank, alpha, rslora, init, learning_rate, seed, data; all combinations are trained."""
    at_once: int = 0
    """Adapters computed together; 0: all. Fewer need less memory."""


def trials_of(config: SweepConfig) -> list[tuple[str, TrainConfig]]:
    """(name, settings) of each combination. Raises ValueError for a name that cannot differ, or a wrong value."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    axes: list[list[tuple[str, Any]]] = []
    for line in config.grid:
        name, equals, values = line.partition("=")
        name = name.replace("-", "_")
        if name not in GRID or not equals:
            raise ValueError(f"grid {line!r}: NAME=VALUE,VALUE with a name of {', '.join(GRID)}")
        axes.append([(name, read(text, kinds[name], f"grid {line!r}")) for text in values.split(",")])
    if not axes:
        raise ValueError("a sweep needs a grid: --grid rank=4,8 learning_rate=1e-3,3e-4")
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)} | {"overwrite": False}
    out = []
    for n, choice in enumerate(itertools.product(*axes)):
        name = "-".join(
            [str(n), *(f"{key}={Path(str(value)).stem if key == 'data' else value}" for key, value in choice)]
        )
        out.append((name, TrainConfig(**{**plain, **dict(choice), "output": str(Path(config.output) / name)})))
    return out


def read(text: str, kind: str, where: str) -> Any:
    """A value of the grid as a field annotated `kind`."""
    plain = text.strip()
    if kind == "int" and plain.lstrip("-").isdigit():
        return int(plain)
    if kind == "bool" and plain.lower() in ("true", "false"):
        return plain.lower() == "true"
    return as_field(plain, kind, where)


def sweep_command(config: SweepConfig) -> dict[str, Any]:
    """Run it. Returns {trials: [{name, before, after, adapter}], best}; adapters in `output`/NAME/adapter.

    Of `bad_steps` count those in which no adapter's loss is finite. Raises ValueError for settings that cannot go into
    one program, and what `train` raises; SIGTERM ends it with nothing saved.
    """
    trials = trials_of(config)
    refuse(config, trials)
    task = task_of(trials[0][1], rows_to_use(trials[0][1])[0])
    base = task.load()
    parts = [part(settings, base) for _, settings in trials]
    steps = steps_of({name: one for (name, _), one in zip(trials, parts, strict=True)})
    out, first = Path(config.output), trials[0][1]
    out.mkdir(parents=True, exist_ok=True)
    made = [made_by(settings, base) for _, settings in trials]
    grown = [make(base.params) for _, make in made]
    frozen, stacked = grown[0][0], stack([trained for _, trained in grown])
    say(f"{len(trials)} adapters, {steps} steps; the first:\n{jlora.summary(frozen, grown[0][1])}")
    tx = make_optimiser(dataclasses.replace(rates(first), learning_rate=1.0), steps)
    objective = task.objective(base)
    peaks, seeds = [s.learning_rate for _, s in trials], [s.seed for _, s in trials]
    how: dict[str, Any] = {"rates": peaks, "seeds": seeds, "accumulate": first.accumulate, "at_once": config.at_once}
    step = make_sweep_step(objective, tx, stacked, **how)
    batches = SweepSource([one.task.training(one.examples, steps) for one in parts]).iterator()
    judge = make_eval_step(objective)
    score = lambda trained, one: evaluate(judge, trained, frozen, one.tests.iterator()) if one.tests else {}
    before = [score(trained, one) for (_, trained), one in zip(grown, parts, strict=True)]
    for folder in (config.output, *(settings.output for _, settings in trials)):
        empty(folder)
    metrics, began = Metrics(out / "metrics.jsonl"), time.monotonic()
    state = init_sweep(stacked, tx)
    with Reporter(steps, label="training") as bar:

        def log(record: dict[str, Any]) -> None:
            metrics.write("train", {name: x for name, x in record.items() if name != "seconds"})
            bar.update(record["step"], f"losses {' '.join(f'{x:.3f}' for x in record['losses'])}")

        try:
            state = fit(step, state, frozen, batches, steps=steps, log=log, figures=each, bad_steps=first.bad_steps)
        except Interrupted:
            say("ended by SIGTERM: a sweep has no checkpoints, and saves its adapters after the last step")
            raise
    say(f"trained in {time.monotonic() - began:.0f} s")
    report: dict[str, Any] = {"trials": []}
    for n, (name, settings) in enumerate(trials):
        trained = stacked.unstack(state.trained, n)
        folder = Path(settings.output)
        folder.mkdir(parents=True, exist_ok=True)
        save_settings(settings, folder / "settings.yaml")
        found = {"name": name, "before": before[n], "after": score(trained, parts[n])}
        save = keeper(settings, base, made[n][0], grown[n][1])
        found["adapter"] = str(save(folder / "adapter", trained, {"data": settings.data, "steps": steps}))
        parts[n].task.beside(folder / "adapter")
        report["trials"].append(found)
        if found["after"]:
            say(f"{name}: loss {found['before']['loss']:.4g} -> {found['after']['loss']:.4g}")
    if all(found["after"] for found in report["trials"]):
        report["best"] = min(report["trials"], key=lambda found: found["after"]["loss"])["name"]
    write_json(out / "report.json", report)
    return report


def refuse(config: SweepConfig, trials: list[tuple[str, TrainConfig]]) -> None:
    """Raises ValueError for what cannot go into one program, FileExistsError for an output that holds another run."""
    refuse_used(config)
    for name in ("adapter", "resume", "packing", "eval_every", "patience", "metrics", "track", "dry_run"):
        if getattr(config, name):
            raise ValueError(f"a sweep has no {name}: train the trial that you want by itself")
    if config.mesh or jax.device_count() > 1:
        raise ValueError(f"a sweep runs on one device, and there are {jax.device_count()}: show it one, without mesh")
    if config.method != "lora" or config.optimiser not in ("adamw", "lion", "sgd"):
        raise ValueError("a sweep is of method lora by adamw, lion or sgd, whose rules are one element's")
    for _, settings in trials:
        check(settings)
        if settings.init in ("pissa", "olora"):
            raise ValueError(f"a sweep has one base: init {settings.init} would change it")


@dataclasses.dataclass(frozen=True)
class Part:
    """One trial's data."""

    task: Answers
    examples: list[Any]
    tests: BatchSource | None


def steps_of(parts: dict[str, Part]) -> int:
    """The steps of every trial. Raises ValueError where they differ: each one's schedule would end at its own last."""
    counts = {name: one.task.steps(one.examples) for name, one in parts.items()}
    if len({*counts.values()}) > 1:
        said = ", ".join(f"{name} takes {count} steps" for name, count in counts.items())
        raise ValueError(f"the trials of a sweep train equally long, and {said}: give --steps")
    return max(counts.values())


def part(settings: TrainConfig, base: Pretrained) -> Part:
    """The rows of one trial. Raises ValueError for labels, whose heads a sweep does not make."""
    train_rows, test_rows = rows_to_use(settings)
    task = task_of(settings, train_rows)
    if task.head:
        raise ValueError("a sweep is of answers and preferences, not of labels")
    examples = task.examples(train_rows, base, settings.data)
    return Part(task, examples, task.testing(task.examples(test_rows, base, "held out")) if test_rows else None)


def each(sums: Any, norms: Any) -> dict[str, Any]:
    """A step's figures: `losses`, an entry an adapter, and the means over the adapters whose loss is finite."""
    alone = [means(Sums(*(float(x[n]) for x in sums))) for n in range(len(norms))]
    good = [one for one in alone if np.isfinite(one["loss"])] or alone
    whole = {name: float(np.mean([one[name] for one in good])) for name in alone[0]}
    finite = [float(x) for x in norms if np.isfinite(x)]
    return {**whole, "losses": [one["loss"] for one in alone], "grad_norm": float(np.mean(finite or [np.nan]))}
