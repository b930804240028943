"""Figures over any choice of examples, so that a bootstrap can draw them: each with its interval, and differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora.commands.written import short
from jlora.data import BatchSource
from jlora.train import Sums
from jlora.train.metrics import text_metric
from jlora.train.report import Reporter

Measure = Callable[[Any], dict[str, float]]
"""f(example numbers i64 [n], or a slice) -> figures of those examples."""
TEXT_DRAWS = 200
"""At most so many draws for metrics of texts: each is computed again on every one."""


def of_sums(name: str, judge: Callable[[Any], Sums], testing: BatchSource) -> tuple[Measure, dict[str, np.ndarray]]:
    """(loss in nats a label, token accuracy, exact answers, first tokens right; `Sums`' fields f64 [n] each).

    judge: batch -> `Sums` of arrays, an entry an example.
    """
    parts = []
    with Reporter(len(testing), label=f"evaluating {name}") as bar:
        for n in range(len(testing)):
            sums = jax.device_get(judge(testing[n]))
            there = np.asarray(sums.examples) > 0
            parts.append([np.asarray(x, np.float64)[there] for x in sums])
            bar.update(n + 1)
    held = {field: np.concatenate(x) for field, x in zip(Sums._fields, zip(*parts, strict=True), strict=True)}

    def measure(at: Any) -> dict[str, float]:
        total = {field: float(x[at].sum()) for field, x in held.items()}
        loss = total["loss"] / total["tokens"]
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        found["token_accuracy"] = total["right"] / total["tokens"]
        return found | {key: total[key] / total["examples"] for key in ("exact", "first")}

    return measure, held


def of_pairs(held: dict[str, np.ndarray]) -> Measure:
    """How often the chosen answer is the likelier one, and by how many nats: examples 2n and 2n + 1 are a pair."""
    apart = held["loss"][1::2] - held["loss"][::2]
    return lambda at: {"accuracy": float((apart[at] > 0).mean()), "margin": float(apart[at].mean())}


def of_texts(names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """Metrics of written answers."""
    metrics = {short(name): text_metric(name) for name in names}

    def measure(at: Any) -> dict[str, float]:
        chosen = np.arange(len(texts))[at]
        some, wanted = [texts[int(n)] for n in chosen], [references[int(n)] for n in chosen]
        return {name: float(metric(some, wanted)) for name, metric in metrics.items()}

    return measure


def compared(measures: Mapping[str, Measure], count: int, draws: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """{model: figures}, and {difference: the last less the first} of two; beside each NAME its NAME_interval, the 95 %
    percentile bootstrap (Efron 1979) over the `count` examples, drawn together for all models."""
    rng = np.random.default_rng(seed)
    chosen = [slice(None), *(rng.integers(0, count, count) for _ in range(draws))]
    found = {name: [measure(at) for at in chosen] for name, measure in measures.items()}
    if len(found) == 2:
        first, last = found.values()
        found["difference"] = [{k: b[k] - a[k] for k in b} for a, b in zip(first, last, strict=True)]
    out: dict[str, dict[str, Any]] = {}
    for model, (whole, *drawn) in found.items():
        out[model] = {}
        for name, value in whole.items():
            out[model][name] = value
            if drawn:
                low, high = np.percentile([one[name] for one in drawn], [2.5, 97.5])
                out[model][f"{name}_interval"] = [float(low), float(high)]
    return out
