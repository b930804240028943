"""`jlora profile`: one step of a run, by the clock and in bytes. The settings are those of `jlora train`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.commands.examine import Examiner
from jlora.commands.parts import going_on, made_by, rows_of
from jlora.commands.settings import TrainConfig, check, say
from jlora.commands.tasks import task_of
from jlora.profile import profile


@dataclasses.dataclass(frozen=True)
class ProfileConfig(TrainConfig):
    """Show where a training step's time and memory go; takes the settings of train, and trains nothing."""

    repeats: int = 5
    """Steps under the profiler."""


def profile_command(config: ProfileConfig) -> dict[str, Any]:
    """Profile the step on the fullest of its first batches. Returns {seconds, by_kind, longest, bytes, batch}."""
    check(config)
    config = going_on(config)
    rows = rows_of(config, config.data)
    task = task_of(config, rows)
    base = task.load()
    examples = task.examples(rows, base, config.data)
    frozen, lora = made_by(config, base, task.whole)[1](base.params)
    spread = task.spread
    examiner = Examiner(config, task, base, spread.tree(frozen), spread.tree(lora))
    task.fits(examiner.tuned, examples)
    source = task.planned(examples)
    batch = max((source[n] for n in range(8)), key=lambda batch: batch["mask"].sum())
    shape = list(batch["tokens"].shape)
    say(f"compiling and running a step on tokens {shape}, {int(batch['mask'].sum())} of them real")
    state, step = task.begin(examiner.tuned, examiner.lora, len(source))
    found = profile(step, state, examiner.held, jax.device_put(spread.batch(batch)), repeats=config.repeats)
    say(str(found))
    names = ("instruction", "kind", "seconds", "scope")
    longest = [dict(zip(names, line, strict=True)) for line in found.longest]
    return {"batch": shape, **dataclasses.asdict(found), "longest": longest}
