"""`jlora profile`: one step of a run, by the clock and in bytes. The settings are those of `jlora train`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.commands.examine import Examiner
from jlora.commands.parts import made_by, optimiser_of, rows_of
from jlora.commands.settings import TrainConfig, check, say
from jlora.commands.tasks import task_of
from jlora.profile import profile
from jlora.train import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class ProfileConfig(TrainConfig):
    """Show where a training step's time and memory go; takes the settings of train, and trains nothing."""

    repeats: int = 5
    """Steps under the profiler."""


def profile_command(config: ProfileConfig) -> dict[str, Any]:
    """Profile the step on the fullest of its first batches. Returns {seconds, by_kind, longest, bytes, batch}."""
    check(config)
    rows = rows_of(config, config.data)
    task = task_of(config, rows)
    base = task.load()
    examples = task.examples(rows, base, config.data)
    frozen, lora = made_by(config, base, task.whole)[1](base.params)
    spread = task.spread
    examiner = Examiner(config, task, base, spread.tree(frozen), spread.tree(lora))
    tx = optimiser_of(config, task.steps(examples))
    source = task.training(examples, 8)
    batch = max((source[n] for n in range(8)), key=lambda batch: batch["mask"].sum())
    shape = list(batch["tokens"].shape)
    say(f"compiling and running a step on tokens {shape}, {int(batch['mask'].sum())} of them real")
    state = spread.state(init_state(examiner.lora, tx))
    how: dict[str, Any] = {"seed": config.seed, "accumulate": config.accumulate, "lies": spread.lies(state)}
    step = make_train_step(task.objective(examiner.tuned), tx, **how)
    found = profile(step, state, examiner.frozen, jax.device_put(spread.batch(batch)), repeats=config.repeats)
    say(str(found))
    names = ("instruction", "kind", "seconds", "scope")
    longest = [dict(zip(names, line, strict=True)) for line in found.longest]
    return {"batch": shape, **dataclasses.asdict(found), "longest": longest}
