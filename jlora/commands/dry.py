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
from jlora.commands.settings import TrainConfig, say
from jlora.data import BatchSource, Example, bucket_lengths
from jlora.io import Pretrained
from jlora.tree import nbytes, size


def describe(
    config: TrainConfig,
    base: Pretrained,
    make: Callable[[Any], tuple[Any, Any]],
    examples: list[Example],
    tests: list[Example],
) -> dict[str, Any]:
    """Say settings, trainable table, bytes and the first example on stderr; returns the same figures."""
    say(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}))
    frozen, lora = jax.eval_shape(make, base.params)
    say(jlora.summary(frozen, lora))
    lengths = bucket_lengths(examples, config.buckets)
    source = BatchSource(examples, config.batch, lengths, accumulate=config.accumulate, steps=1)
    steps = config.steps or max(1, round(config.epochs * source.per_epoch))
    sizes = [len(e.tokens) for e in examples]
    factors = nbytes(lora)
    figures = {
        "rows": len(examples),
        "eval_rows": len(tests),
        "steps": steps,
        "padded_lengths": lengths,
        "longest": max(sizes),
        "mean_length": float(np.mean(sizes)),
        "answer_share": float(sum(e.loss_mask.sum() for e in examples) / sum(sizes)),
        "trained_parameters": size(lora),
        "bytes": {"frozen": nbytes(frozen), "trained": factors, "gradients": factors, "optimiser": 2 * factors},
    }
    for name, value in figures.items():
        say(f"{name}: {value}")
    say("the first example (the loss is taken on what stands between « and »):")
    say(shown(examples[0], base.tokenizer, sys.stderr.isatty()))
    return {"dry_run": True, **figures}


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
