"""Held-out rows before, during and after a run: figures, metrics of written answers, samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

import jlora
from jlora.commands.parts import answer
from jlora.commands.settings import TrainConfig, say
from jlora.commands.tasks import Answers
from jlora.commands.written import Prompt, questions, scores, write
from jlora.data import Row
from jlora.data.tokens import posed
from jlora.io import Pretrained
from jlora.methods.columns import reading
from jlora.train.loop import Interrupted, Stop
from jlora.train.report import Reporter


class Examiner:
    """What is asked of a model. `base` as it was read; `tuned` the same with the prefix that the trained tree has.

    Every method raises `Interrupted` once `stop()`.
    """

    def __init__(self, config: TrainConfig, task: Answers, base: Pretrained, frozen: Any, lora: Any):
        self.config, self.task, self.base = config, task, base
        self.frozen, self.lora = frozen, lora
        self.tuned = dataclasses.replace(base, model=reading(base.model, frozen, lora))
        self.judge, self.held = task.judge(self.tuned), task.held(frozen, lora)
        self.testing: Any = None
        self.shown: list[Row] = []
        self.asked: dict[Prompt, list[str]] = {}
        self.stop: Stop = lambda: False

    def ask(self, tests: list[Any], rows: list[Row], stop: Stop) -> None:
        """The held-out examples, and their rows."""
        self.testing, self.stop = self.task.testing(tests) if tests else None, stop
        # answers are written by one process, which does not hold the whole model where there are more
        alone = self.task.asked(rows) if jax.process_count() == 1 else []
        pose = lambda some: [posed(row, self.base.tokenizer, self.base.ends) for row in some]
        self.shown = pose(alone[: self.config.samples])
        if self.config.metrics and self.task.head is None and jax.process_count() == 1:
            found = questions(pose(alone or rows), self.base.tokenizer)
            self.asked = dict(list(found.items())[: self.config.metric_rows])

    def before(self) -> dict[str, float]:
        """`full` of the base, or of the adapter to go on from."""
        if self.tuned.model is self.base.model or self.config.adapter:
            return self.full("before", self.lora)
        # an untrained prefix is not the model that it is put before
        nothing = jax.tree.map(lambda _: None, self.base.params)
        plain = Examiner(self.config, self.task, self.base, self.base.params, nothing)
        plain.testing, plain.asked, plain.stop = self.testing, self.asked, self.stop
        return plain.full("before", nothing)

    def full(self, name: str, trained: Any) -> dict[str, float]:
        """`figures` and, where they are asked for, metrics of written answers."""
        found = self.figures(name, trained)
        if self.asked:
            c, params = self.config, jlora.combine(self.frozen, trained)
            how = {"max_new_tokens": c.max_new_tokens, "batch": c.batch, "stop": self.stop}
            texts = write(self.tuned, params, list(self.asked), **how)
            more = scores(c.metrics, texts, list(self.asked.values()))
            told(f"{name}, {len(texts)} written answers", more)
            found |= more
        return found

    def figures(self, name: str, trained: Any) -> dict[str, float]:
        """The task's figures of the held-out examples."""
        with Reporter(len(self.testing), label=f"evaluating {name}") as bar:
            found = self.judge(trained, self.held, self.testing, self.stop, bar.update)
        told(name, found)
        return found

    def answers(self, base: Pretrained, params: Any) -> list[str]:
        """What a model writes after each sample prompt."""
        texts = []
        for row in self.shown:
            if self.stop():
                raise Interrupted
            texts.append(answer(base, params, row))
        return texts

    def answers_now(self, trained: Any) -> list[str]:
        """`answers` under the adapter."""
        return self.answers(self.tuned, jlora.combine(self.frozen, trained))


def told(name: str, figures: dict[str, float]) -> None:
    """An evaluation's figures in a line."""
    said = {"exact": "exact answer", "first": "first token right"}
    shares, left = ("first", "accuracy"), ("tokens", "examples", "token_accuracy")
    parts = [
        f"{said.get(key, key)} {value:.1%}" if key in (*shares, "exact") else f"{key} {value:.4g}"
        for key, value in figures.items()
        if key not in left
    ]
    say(f"{name}: {', '.join(parts)}")
