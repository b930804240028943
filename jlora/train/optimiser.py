"""Optimisers and schedules by optax: clipping, warm-up, decay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import optax.contrib


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """`learning_rate` is the peak; `warmup` and `clip` may be 0 for none. b1, b2: of adamw and lion; b2 is 0.999 of the
    one and 0.99 of the other, if not given."""

    learning_rate: float = 1e-3
    optimiser: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Down to 0 at the last step; wsd (warm-up, stable, decay) keeps the peak for all but the last fifth."""
    warmup: int = 5
    """Steps from 0 to the peak."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global norm of the gradient."""
    b1: float = 0.9
    b2: float | None = None


def make_schedule(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to the peak, then down to 0 at `steps` (or constant)."""
    peak, rest = config.learning_rate, max(steps - config.warmup, 1)
    decay = max(rest // 5, 1)
    tails: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.linear_schedule(peak, 0.0, decay, transition_begin=rest - decay),
    }
    if not config.warmup:
        return tails[config.schedule]
    # the first step of a schedule that starts at 0 would be lost: start one step up
    start = optax.linear_schedule(peak / (config.warmup + 1), peak, config.warmup)
    return optax.join_schedules([start, tails[config.schedule]], [config.warmup])


def matrices(params: Any) -> Any:
    """Muon's axes of each leaf: its last two, or None for a leaf of fewer."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda leaf: axes if leaf.ndim >= 2 else None, params)


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation for `steps` steps, clipping and all."""
    return clipped(unclipped(config, steps), config.clip)


def clipped(inner: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """`inner` on gradients of a global norm of at most `norm`; 0: of any. One form of state: a run may change it."""
    return optax.chain(optax.clip_by_global_norm(norm) if norm else optax.identity(), inner)


def unclipped(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """`make_optimiser` without clipping."""
    rate, decay = make_schedule(config, steps), config.weight_decay
    second = lambda usual: usual if config.b2 is None else config.b2
    makers: dict[str, Callable[[], Any]] = {
        "adamw": lambda: optax.adamw(rate, b1=config.b1, b2=second(0.999), weight_decay=decay),
        "lion": lambda: optax.lion(rate, b1=config.b1, b2=second(0.99), weight_decay=decay),
        # optax's own decay of adafactor is not scaled by the learning rate
        "adafactor": lambda: optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-decay),
            optax.scale_by_schedule(rate),
        ),
        # a factor's stack axes are not a matrix's: muon takes the last two, what is no matrix goes to its adam
        "muon": lambda: optax.contrib.muon(rate, weight_decay=decay, muon_weight_dimension_numbers=matrices),
        "sgd": lambda: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=config.b1)),
    }
    return makers[config.optimiser]()
