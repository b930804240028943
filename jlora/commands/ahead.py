"""`--dry-run --topology v5e:2x4`: the run's own step by the real TPU compiler, with no TPU and no weights at hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.commands.settings import TrainConfig, say
from jlora.commands.spread import Spread, mesh_for
from jlora.commands.tasks import Answers
from jlora.data import BatchSource
from jlora.io import Pretrained
from jlora.methods.columns import reading
from jlora.plan.estimate import room
from jlora.plan.known import topology
from jlora.plan.tpu import compile_step, devices_of, reason


def compiled_ahead(
    config: TrainConfig,
    task: Answers,
    base: Pretrained,
    frozen: Any,
    start: Any,
    source: BatchSource,
) -> dict[str, Any]:
    """What the compiler says of a step on the longest batch: bytes a chip, cycles, what crosses the wires.

    frozen, start: the trees as shapes.

    Raises ValueError where it refuses the step, as one that does not fit, and for a GPU; ImportError without libtpu.
    """
    task.spread = Spread(mesh_for(config, devices_of(config.topology)), base.layouts, config.attention, "tpu")
    tuned = dataclasses.replace(base, model=reading(base.model, frozen, start))
    state, step = task.begin(tuned, start, len(source))
    batch = task.spread.shapes(source.longest())
    say(f"compiling the step for {config.topology}, {list(batch['tokens'].shape)} tokens")
    try:
        found = compile_step(step, state, task.held(*map(task.spread.tree, (frozen, start))), batch)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the compiler for {config.topology} refused: {reason(str(error))}") from None
    say(f"a chip holds {found['peak'] / 1e9:.2f} GB of {room(topology(config.topology)) / 1e9:.1f}")
    return found
