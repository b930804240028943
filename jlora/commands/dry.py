"""`--dry-run`: what a run would do, from shapes alone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import yaml

import jlora
from jlora.commands.ahead import compiled_ahead
from jlora.commands.parts import optimiser_of
from jlora.commands.settings import TrainConfig, say
from jlora.commands.tasks import Answers
from jlora.data import Example
from jlora.io import Pretrained
from jlora.methods.columns import reading
from jlora.tree import nbytes, size


def describe(
    config: TrainConfig,
    task: Answers,
    base: Pretrained,
    make: Callable[[Any], tuple[Any, Any]],
    examples: list[Any],
    tests: list[Any],
) -> dict[str, Any]:
    """Say settings, trainable table, bytes and the first batch on stderr; returns the same figures."""
    say(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}))
    frozen, lora = jax.eval_shape(make, base.params)
    say(jlora.summary(frozen, lora))
    task.fits(dataclasses.replace(base, model=reading(base.model, frozen, lora)), [*examples, *tests])
    source, sequences = task.planned(examples), task.flat(examples)
    steps = len(source)
    batch = source[0]
    sizes = [len(e.tokens) for e in sequences]
    trained = nbytes(lora)
    state = nbytes(jax.eval_shape(optimiser_of(config, steps).init, lora))
    figures = {
        "rows": len(examples),
        "eval_rows": len(tests),
        "cut": task.cut,
        "steps": steps,
        "padded_lengths": source.lengths,
        "compiled_shapes": source.shapes,
        "longest": max(sizes),
        "mean_length": float(np.mean(sizes)),
        "answer_share": float(sum(e.loss_mask.sum() for e in sequences) / sum(sizes)),
        "trained_parameters": size(lora),
        "bytes": {"frozen": nbytes(frozen), "trained": trained, "gradients": trained, "optimiser": state},
        "first_batch": {"tokens": list(batch["tokens"].shape), "useful_share": float(batch["mask"].mean())},
    }
    for name, value in figures.items():
        say(f"{name}: {value}")
    say("the first batch (the loss is taken on what stands between « and »):")
    for row in rows_of_batch(batch):
        say(f"- {shown(row, base.tokenizer, sys.stderr.isatty())}")
    if config.topology:
        figures["compiled"] = compiled_ahead(config, task, base, frozen, lora, source)
    return {"dry_run": True, **figures}


def rows_of_batch(batch: dict[str, np.ndarray]) -> list[Example]:
    """Each row of a batch, without padding, with what carries the loss."""
    flat = {name: x if x.ndim == 2 or name not in ("tokens", "mask") else x[0] for name, x in batch.items()}
    tokens, mask = flat["tokens"], flat["mask"]
    carries = np.zeros(tokens.size, bool)
    if "positions" in batch:
        at, weights = (
            batch[name] if batch["tokens"].ndim == 2 else batch[name][0] for name in ("positions", "weights")
        )
        carries[at[weights > 0] + 1] = True  # a position is that of the token before
    carries = carries.reshape(tokens.shape)
    return [Example(t[m], c[m]) for t, m, c in zip(tokens, mask, carries, strict=True) if m.any()]


def shown(example: Example, tokenizer: Any, colour: bool) -> str:
    """The text of an example with what carries the loss marked, « » and, on a terminal, by colour."""
    out = []
    edges = np.flatnonzero(np.diff(example.loss_mask.astype(int))) + 1
    for part in np.split(np.arange(len(example.tokens)), edges):
        text = tokenizer.decode(example.tokens[part])
        if example.loss_mask[part[0]]:
            out.append(f"\x1b[1;32m«{text}»\x1b[0m" if colour else f"«{text}»")
        else:
            out.append(f"\x1b[2m{text}\x1b[0m" if colour else text)
    return "".join(out)
