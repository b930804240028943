"""One fit: a task's rows on a base model by one method, the compiled step shared by every rate and seed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.commands.parts import made_by, method_of, optimiser_of, rates
from jlora.commands.settings import TrainConfig
from jlora.commands.tasks import task_of
from jlora.data import Row
from jlora.methods.columns import reading
from jlora.train import init_state
from jlora.train.optimiser import make_schedule
from jlora.train.report import Reporter
from jlora.train.step import advance
from jlora.tree import paths, size


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A model while or after it is trained. `base` reads the trained prefix by itself, if there is one."""

    base: Any
    frozen: Any
    trained: Any
    losses: list[float]
    """Of the batches so far, nats a label (squared error of numbers)."""
    count: int
    """Trained parameters, the head's left out, as in the paper."""
    judged: Callable[[Any, Any, str], dict[str, float]]

    @property
    def params(self) -> Any:
        return jlora.combine(self.frozen, self.trained)

    def judge(self, name: str) -> dict[str, float]:
        """The figures of a test set."""
        return self.judged(self.trained, self.frozen, name)


class Work:
    """A task's rows read for a base model: what its fits share. tests: {name: rows}."""

    def __init__(self, config: TrainConfig, train: Sequence[Row], tests: dict[str, Sequence[Row]]):
        every = [*train, *(row for rows in tests.values() for row in rows)]
        self.config, self.task = config, task_of(config, every)
        self.base = self.task.load()
        self.examples = self.task.examples(list(train), self.base, "train")
        self.rows = {name: list(rows) for name, rows in tests.items()}
        read = {name: self.task.examples(rows, self.base, name) for name, rows in self.rows.items()}
        self.tests = {name: self.task.testing(examples) for name, examples in read.items()}
        self.programs: dict[Any, Any] = {}

    def fit(
        self,
        settings: dict[str, Any],
        *,
        rate: float,
        steps: int,
        seed: int = 0,
        rows: int | None = None,
        after: Callable[[int, Fitted], None] = lambda step, fitted: None,
    ) -> Fitted:
        """Train by `settings` (fields of TrainConfig). rows: the first so many examples only. after: called with the
        steps taken, 0 too. Raises FloatingPointError once the loss is not finite.

        Rates are arguments of the compiled step, so a second rate or seed compiles nothing.
        """
        config = dataclasses.replace(self.config, **settings, seed=seed, learning_rate=rate, steps=steps)
        task = copy.copy(self.task)
        task.config = config
        frozen, start = made_by(config, self.base, task.whole)[1](self.base.params)
        tuned = dataclasses.replace(self.base, model=reading(self.base.model, frozen, start))
        tx = optimiser_of(dataclasses.replace(config, learning_rate=1.0, schedule="constant", warmup=0), steps)
        step, judge = self.programs_of(config, task, tuned, tx)
        judged = lambda trained, frozen, name: judge(trained, frozen, self.tests[name], lambda: False, lambda n: None)
        trained, opt_state, _ = init_state(start, tx)
        fitted = Fitted(tuned, frozen, trained, [], self.size(start), judged)
        source, schedule = task.training(self.examples[:rows], steps), make_schedule(rates(config), steps)
        after(0, fitted)
        with Reporter(steps, label=f"  {config.method} {rate:g}", every=max(1, steps // 2)) as bar:
            for n in range(steps):
                key, now = jax.random.fold_in(jax.random.key(seed), n), jnp.asarray(schedule(n), jnp.float32)
                trained, opt_state, sums, _ = step(fitted.trained, opt_state, frozen, source[n], key, now)
                loss = float(sums.loss) / max(float(sums.tokens), 1.0)
                if not np.isfinite(loss):
                    raise FloatingPointError(f"{config.method}, rate {rate:g}: the loss is {loss} at step {n}")
                fitted = dataclasses.replace(fitted, trained=trained, losses=[*fitted.losses, loss])
                bar.update(n + 1, f"loss {loss:.3f}")
                after(n + 1, fitted)
        return fitted

    def programs_of(self, config: TrainConfig, task: Any, tuned: Any, tx: Any) -> tuple[Any, Any]:
        """(step, judge) of a method, kept: its settings decide both."""
        key = (*dataclasses.astuple(method_of(config)), config.optimiser, config.weight_decay, config.label_smoothing)
        if key not in self.programs:
            step = jax.jit(advance(task.objective(tuned), tx), donate_argnums=(0, 1))
            self.programs[key] = (step, task.judge(tuned))
        return self.programs[key]

    def size(self, trained: Any) -> int:
        heads = [leaf for path, leaf in paths(trained).items() if path.startswith(tuple(self.task.whole) or ("//",))]
        return size(trained) - size(heads)
