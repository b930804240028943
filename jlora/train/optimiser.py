"""AdamW by optax: clipping, warm-up, schedule."""

from __future__ import annotations

import dataclasses
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """`learning_rate` is the peak; `warmup` and `clip` may be 0 for none."""

    learning_rate: float = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: int = 5
    """Steps from 0 to the peak."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global norm of the gradient."""
    b1: float = 0.9
    b2: float = 0.999


def make_schedule(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to the peak, then down to 0 at `steps` (or constant)."""
    peak, rest = config.learning_rate, max(steps - config.warmup, 1)
    tails: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }
    if not config.warmup:
        return tails[config.schedule]
    # the first step of a schedule that starts at 0 would be lost: start one step up
    start = optax.linear_schedule(peak / (config.warmup + 1), peak, config.warmup)
    return optax.join_schedules([start, tails[config.schedule]], [config.warmup])


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation for `steps` steps."""
    adam = optax.adamw(make_schedule(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam
