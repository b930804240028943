"""Trainable parameters of the paper's tables: printed there, by its formulas, and of the real methods.

    python experiments/counts.py

Every model and method of tables 2, 3, 4 and 15 (13 and 14 repeat 3's, rounded). Every count is of the trees that
`jlora`'s methods make for that model's config, as shapes: no weight exists, GPT-3's 175 billion neither. Classifier
heads are not counted, as in the paper.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.methods import adapter, bitfit, full, fused, prefix
from jlora.methods.together import together
from jlora.models import family
from jlora.models.bert import BertConfig
from jlora.models.deberta import XXLARGE
from jlora.models.gpt2 import GPT3, GPT2Config
from jlora.tree import size

CONFIGS = {
    "RoBERTa-base": BertConfig(50265, 768, 3072, 12, 12, 514, 1, 1e-5, pad_token_id=1, model_type="roberta"),
    "RoBERTa-large": BertConfig(50265, 1024, 4096, 24, 16, 514, 1, 1e-5, pad_token_id=1, model_type="roberta"),
    "DeBERTa-XXL": XXLARGE,
    "GPT-2 M": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 L": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "GPT-3 175B": GPT3["175b"],
}
SIZES = {"RoBERTa-base": (12, 768), "RoBERTa-large": (24, 1024), "DeBERTa-XXL": (48, 1536)}
SIZES |= {"GPT-2 M": (24, 1024), "GPT-2 L": (36, 1280), "GPT-3 175B": (96, 12288)}
"""Layers and width."""


@functools.lru_cache
def shapes(name: str) -> Any:
    config = CONFIGS[name]
    model = family(config.model_type).model(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def trained(name: str, make: Callable[[Any], tuple[Any, Any]]) -> int:
    return size(jax.eval_shape(lambda p: make(p)[1], shapes(name)))


def query_and_value(rank: int) -> Callable[[Any], tuple[Any, Any]]:
    """LoRA on these two, in GPT-2's fused weight too."""

    def make(params: Any) -> tuple[Any, Any]:
        paths = jlora.tree.paths(params)
        if any("c_attn" in path for path in paths):
            return fused_parts(rank, "x-x")(params)
        named = [
            p
            for p in paths
            if p.endswith("/kernel") and {"query", "value", "query_proj", "value_proj"} & {*p.split("/")}
        ]
        return jlora.lorafy(params, rank, targets=named, layouts={p: "sio" for p in named})

    return make


def fused_parts(rank: int, parts: str) -> Callable[[Any], tuple[Any, Any]]:
    """LoRA on query, key and value of GPT's c_attn where there is an x."""
    return lambda p: fused.make(p, rank, parts={"c_attn/kernel": [part == "x" for part in parts]})


def lora(layers: int, d: int, r: int, weights: int = 2) -> int:
    """2 · L_lora · d · r, so many weights a layer."""
    return 2 * (weights * layers) * d * r


def adapters(layers: int, d: int, r: int, each: int = 1, norms: int = 0) -> int:
    """n_adpt · (2 d r + r + d) + 2 · n_LN · d."""
    return each * layers * (2 * d * r + r + d) + 2 * norms * d


@dataclasses.dataclass(frozen=True)
class Row:
    """Numbers as the paper prints them (`paper`, in millions, "" if it prints none) and what explains a difference."""

    model: str
    what: str
    paper: str
    make: Callable[[Any], tuple[Any, Any]]
    formula: Callable[[int, int], int] | None
    note: str = ""


TENTH = "the paper prints 0.1 % of the whole model, as Li & Liang do"
UNKNOWN = "no reason found"
BINARY = "as printed if a million is 2^20; FT-top2's 25.19 is 24 so, which tables 13 and 14 print"
ROWS = [
    Row("RoBERTa-base", "full", "125.0", full.make, None, "a round number; 124.65 with a classifier's dense layer"),
    Row("RoBERTa-large", "full", "355.0", full.make, None, "a round number; 355.36 with that layer"),
    Row("DeBERTa-XXL", "full", "1500.0", full.make, None, "a round number; the released model has 1.56 billion"),
    Row("GPT-2 M", "full", "354.92", full.make, None, f"{UNKNOWN} for 0.03 %; GPT-2 L agrees to the last digit"),
    Row("GPT-2 L", "full", "774.03", full.make, None),
    Row(
        "GPT-3 175B", "full", "175255.8", full.make, None,
        f"an untied head would give 175,221.8; {UNKNOWN} for the last 0.02 %",
    ),
    Row("RoBERTa-base", "LoRA r=8, q v", "0.3", query_and_value(8), lambda n, d: lora(n, d, 8)),
    Row("RoBERTa-large", "LoRA r=8, q v", "0.8", query_and_value(8), lambda n, d: lora(n, d, 8)),
    Row(
        "DeBERTa-XXL", "LoRA r=16, q v", "4.7", query_and_value(16), lambda n, d: lora(n, d, 16),
        "the recipe table prints r=8, which would give 2.4",
    ),
    Row("GPT-2 M", "LoRA r=4, q v", "0.35", query_and_value(4), lambda n, d: lora(n, d, 4), TENTH),
    Row("GPT-2 L", "LoRA r=4, q v", "0.77", query_and_value(4), lambda n, d: lora(n, d, 4), TENTH),
    Row("GPT-3 175B", "LoRA r=1, q v", "4.7", query_and_value(1), lambda n, d: lora(n, d, 1)),
    Row("GPT-3 175B", "LoRA r=8, q v", "37.7", query_and_value(8), lambda n, d: lora(n, d, 8), "37.75, cut"),
    Row(
        "GPT-3 175B", "prefix-embedding, 256 + 8", "3.2", lambda p: prefix.embedding(p, 264), lambda n, d: d * 264,
    ),
    Row(
        "GPT-3 175B", "prefix-layer, 8 + 8", "20.2", lambda p: prefix.layer(p, 16), lambda n, d: n * d * 16,
        f"{UNKNOWN}: no whole number of columns gives 20.2 (17: 20.05)",
    ),
    Row("GPT-2 M", "prefix-layer, 14", "0.35", lambda p: prefix.layer(p, 14), lambda n, d: n * d * 14, TENTH),
    Row(
        "GPT-2 M", "adapter (Lin) r=6", "0.37", lambda p: adapter.make(p, 6, kind="lin"),
        lambda n, d: adapters(n, d, 6, norms=n), "each adapter has a LayerNorm: n_LN = n_adpt",
    ),
    Row(
        "GPT-2 M", "adapter (Lin) r=224", "11.09", lambda p: adapter.make(p, 224, kind="lin"),
        lambda n, d: adapters(n, d, 224, norms=n),
    ),
    Row(
        "GPT-2 M", "adapter (Houlsby) r=111", "11.09",
        lambda p: together(p, lambda p: adapter.make(p, 111), bitfit.norms),
        lambda n, d: adapters(n, d, 111, 2, norms=2 * n + 1),
        "with the model's own 49 LayerNorms trained; no whole r gives 11.09",
    ),
    Row("GPT-3 175B", "adapter (Houlsby) r=1", "7.1", lambda p: adapter.make(p, 1), lambda n, d: adapters(n, d, 1, 2)),
    Row("GPT-3 175B", "adapter (Houlsby) r=8", "40.1", lambda p: adapter.make(p, 8), lambda n, d: adapters(n, d, 8, 2)),
    Row(
        "RoBERTa-base", "adapter (dropped or not) r=16", "0.3", lambda p: adapter.make(p, 16, kind="pfeiffer"),
        lambda n, d: adapters(n, d, 16),
    ),
    Row(
        "RoBERTa-base", "adapter (dropped or not) r=48", "0.9", lambda p: adapter.make(p, 48, kind="pfeiffer"),
        lambda n, d: adapters(n, d, 48),
    ),
    Row(
        "RoBERTa-base", "BitFit", "0.1", bitfit.make, lambda n, d: n * 11 * d + d,
        "a layer has 11 d: products 9, LayerNorms 2; one more d at the embeddings",
    ),
    Row(
        "GPT-3 175B", "BitFit", "14.2", bitfit.make, lambda n, d: n * 11 * d + d,
        f"14.2 is 12 d a layer, {UNKNOWN}; the architecture has 11 (q k v o 4, MLP 5, LayerNorms 2) and a last d",
    ),
    Row(
        "RoBERTa-large", "adapter (Pfeiffer) r=64", "3.0", lambda p: adapter.make(p, 64, kind="pfeiffer"),
        lambda n, d: adapters(n, d, 64), BINARY,
    ),
    Row(
        "RoBERTa-large", "adapter (Pfeiffer) r=16", "0.8", lambda p: adapter.make(p, 16, kind="pfeiffer"),
        lambda n, d: adapters(n, d, 16),
    ),
    Row(
        "RoBERTa-large", "adapter (Houlsby) r=64", "6.0", lambda p: adapter.make(p, 64),
        lambda n, d: adapters(n, d, 64, 2), BINARY,
    ),
    Row(
        "RoBERTa-large", "adapter (Houlsby) r=8", "0.8", lambda p: adapter.make(p, 8),
        lambda n, d: adapters(n, d, 8, 2),
    ),
    Row("GPT-2 M", "FT-top2", "25.19", lambda p: full.top(p, 2), lambda n, d: 2 * (12 * d * d + 13 * d)),
    Row(
        "GPT-2 L", "adapter (Lin) r=8", "0.88", lambda p: adapter.make(p, 8, kind="lin"),
        lambda n, d: adapters(n, d, 8, norms=n),
    ),
    Row(
        "GPT-2 L", "adapter (Lin) r=248", "23.00", lambda p: adapter.make(p, 248, kind="lin"),
        lambda n, d: adapters(n, d, 248, norms=n),
    ),
    Row("GPT-2 L", "prefix-layer, 17", "0.77", lambda p: prefix.layer(p, 17), lambda n, d: n * d * 17, TENTH),
]  # fmt: skip
Ways = tuple[Callable[[Any], tuple[Any, Any]], Callable[[int, int], int]]


def embedded(columns: int) -> Ways:
    return lambda p: prefix.embedding(p, columns), lambda n, d: columns * d


def layered(columns: int) -> Ways:
    return lambda p: prefix.layer(p, columns), lambda n, d: n * columns * d


def houlsby(r: int) -> Ways:
    return lambda p: adapter.make(p, r), lambda n, d: adapters(n, d, r, 2)


def q_v(r: int) -> Ways:
    return query_and_value(r), lambda n, d: lora(n, d, r)


def q_k_v_o(r: int) -> Ways:
    out = lambda p: jlora.lorafy(p, r, targets="attn/c_proj", layouts={"c_proj/kernel": "sio"})
    return lambda p: together(p, fused_parts(r, "xxx"), out), lambda n, d: lora(n, d, r, 4)


def both(one: Ways, other: Ways) -> Ways:
    return lambda p: together(p, one[0], other[0]), lambda n, d: one[1](n, d) + other[1](n, d)


TABLE_15: list[tuple[str, str, Ways, str]] = [
    ("prefix-embedding, 32 + 8", "0.4", embedded(40), UNKNOWN),
    ("prefix-embedding, 64 + 8", "0.9", embedded(72), ""),
    ("prefix-embedding, 128 + 8", "1.7", embedded(136), ""),
    ("prefix-embedding, 512 + 8", "6.4", embedded(520), ""),
    ("prefix-layer, 2 + 2", "5.1", layered(4), UNKNOWN),
    ("prefix-layer, 8 + 0", "10.1", layered(8), UNKNOWN),
    ("prefix-layer, 32 + 4", "44.1", layered(36), UNKNOWN),
    ("prefix-layer, 64 + 0", "76.1", layered(64), UNKNOWN),
    ("adapter (Houlsby) r=4", "21.2", houlsby(4), ""),
    ("adapter (Houlsby) r=16", "77.9", houlsby(16), ""),
    ("adapter (Houlsby) r=64", "304.4", houlsby(64), ""),
    ("LoRA r=2, v", "4.7", (fused_parts(2, "--x"), lambda n, d: lora(n, d, 2, 1)), ""),
    ("LoRA r=2, q v", "9.4", q_v(2), ""),
    ("LoRA r=4, q v", "18.8", q_v(4), "18.87, cut"),
    ("LoRA r=64, q v", "301.9", q_v(64), "301.99, cut"),
    ("LoRA r=1, q k v o", "9.4", q_k_v_o(1), ""),
    ("LoRA r=2, q k v o", "18.8", q_k_v_o(2), "18.87, cut"),
    ("LoRA r=4, q k v o", "37.7", q_k_v_o(4), "37.75, cut"),
    ("LoRA r=64, q k v o", "603.8", q_k_v_o(64), "twice the 301.9 of q and v"),
    ("LoRA r=8, q v, and prefix-embedding, 8 + 4", "37.8", both(q_v(8), embedded(12)), "37.90, cut"),
    ("LoRA r=32, q v, and prefix-embedding, 8 + 4", "151.1", both(q_v(32), embedded(12)), ""),
    ("LoRA r=64, q v, and prefix-embedding, 8 + 4", "302.1", both(q_v(64), embedded(12)), ""),
    ("LoRA r=8, q v, and prefix-layer, 8 + 4", "52.8", both(q_v(8), layered(12)), UNKNOWN),
]
"""GPT-3's rows that table 4 has not: what trains, printed, made and by formula, why they differ."""
ROWS += [Row("GPT-3 175B", what, paper, *ways, note) for what, paper, ways, note in TABLE_15]


def unexplained() -> list[str]:
    """The printed numbers that neither a formula nor a reason gives."""
    return [f"{row.model} {row.what} ({row.paper})" for row in ROWS if UNKNOWN in row.note]


def main() -> None:
    """Print the table."""
    print("| model | what trains | paper, M | formula, M | here, M | why they differ |\n|---|---|---|---|---|---|")
    for row in ROWS:
        count = trained(row.model, row.make)
        formula = f"{row.formula(*SIZES[row.model]) / 1e6:,.2f}" if row.formula else ""
        print(f"| {row.model} | {row.what} | {row.paper} | {formula} | {count / 1e6:,.2f} | {row.note} |")
    print(f"\n{UNKNOWN}: {'; '.join(unexplained())}")


if __name__ == "__main__":
    main()
