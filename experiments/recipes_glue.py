"""GLUE by the paper's models: its tables 2, 9 and 10.

Where a released script has another value than the table, the table's is taken and the recipe's notes say so. A batch is
the table's: the scripts ask for one on each of 8 GPUs (RoBERTa-base on CoLA: of 2), their README tells of 4. Weight
decay of RoBERTa is the scripts', as its table has none, and DeBERTa's r and alpha are, as the table's r = 8 has half of
the parameters that the paper prints.
"""

from __future__ import annotations

import math
from typing import Any

from experiments.recipe import Recipe

ROWS = {"MNLI": 392_702, "SST-2": 67_349, "MRPC": 3_668, "CoLA": 8_551, "QNLI": 104_743, "QQP": 363_846}
ROWS |= {"RTE": 2_490, "STS-B": 5_749}
"""Training rows."""
HUB = {"MNLI": "mnli", "SST-2": "sst2", "MRPC": "mrpc", "CoLA": "cola", "QNLI": "qnli", "QQP": "qqp", "RTE": "rte"}
HUB |= {"STS-B": "stsb"}
EVAL = "jlora eval --model {model} --adapter runs/{name}/adapter --data {data} --split {split}"
BOTH = "the figure is of matched and mismatched rows together: judge --split validation_mismatched too"
AFRESH = (
    "the paper starts this task from MNLI's adapter, whose head `jlora train --adapter` does not exchange: this run "
)
AFRESH += "starts afresh, so expect less"
SEEDS = "the figure is the median of 5 seeds, each at its best epoch"
NO_DROPOUT = "the paper's encoder has dropout, jlora's none"


def of_tasks(
    short: str,
    columns: dict[str, str],
    figures: str,
    trained: int,
    *,
    warm: float = 0.06,
    way: str = "",
    notes: dict[str, str] | None = None,
    **same: Any,
) -> dict[str, Recipe]:
    """A recipe a task. columns: settings of one value for all tasks, or of one each in the order of `ROWS`.

    figures: the paper's, one each. warm: the share of steps that warm up. way: the end of the recipes' names, in the
    setup of which no task starts from MNLI. notes: more to know, by task.
    """
    words = {name: text.split() * (1 if " " in text else len(ROWS)) for name, text in columns.items()}
    metrics = {"CoLA": "Matthews", "STS-B": "Pearson"}
    out = {}
    for n, (task, figure) in enumerate(zip(ROWS, figures.split(), strict=True)):
        row = {name: (int if name in ("batch", "max_length") else float)(own[n]) for name, own in words.items()}
        steps = row["epochs"] * math.ceil(ROWS[task] / row["batch"])
        settings = {**same, "data": f"hub:nyu-mll/glue:{HUB[task]}", **row, "warmup": round(warm * steps)}
        name, data = f"{short}/{task}{way}", settings["data"]
        split = "validation_matched" if task == "MNLI" else "validation"
        judge = EVAL.format(model=same["model"], name=name.replace("/", "-"), data=data, split=split)
        told = {"MNLI": BOTH} | ({} if way else dict.fromkeys(("MRPC", "RTE", "STS-B"), AFRESH))
        known = (told.get(task), SEEDS, NO_DROPOUT, (notes or {}).get(task))
        expected = f"{metrics.get(task, 'accuracy')} {figure}"
        out[name] = Recipe(settings, expected, trained, judge, tuple(note for note in known if note))
    return out


BASE = {"model": "FacebookAI/roberta-base", "targets": ("query", "value"), "rank": 8, "weight_decay": 0.1}
LARGE = {**BASE, "model": "FacebookAI/roberta-large", "alpha": 16.0}
RATES = "3e-4 4e-4 3e-4 2e-4 2e-4 3e-4 4e-4 2e-4"
GLUE = of_tasks(
    "roberta-base",
    {
        "batch": "16 16 16 32 32 16 32 16", "epochs": "30 60 30 80 25 25 80 40",
        "learning_rate": "5e-4 5e-4 4e-4 4e-4 4e-4 5e-4 5e-4 4e-4", "max_length": "512",
    },
    "87.5 95.1 89.7 63.4 93.3 90.8 86.6 91.5", 294_912, notes=dict.fromkeys(ROWS, "its script: alpha 16"),
    **BASE, alpha=8.0,
)  # fmt: skip
GLUE |= of_tasks(
    "roberta-large",
    {
        "batch": "4 4 4 4 4 4 8 8", "epochs": "10 10 20 20 10 20 20 30", "learning_rate": RATES,
        "max_length": "128 128 512 128 512 512 512 512",
    },
    "90.6 96.2 90.9 68.2 94.9 91.6 87.4 92.6", 786_432,
    notes={
        "SST-2": "its script: batch 8, length 512", "CoLA": "its script: rate 3e-4",
        "STS-B": "its script: batch 4, 10 epochs, rate 3e-4, length 128",
    }, **LARGE,
)  # fmt: skip
MATCHED = {"batch": "4", "epochs": "10 10 20 20 10 20 20 10", "learning_rate": RATES, "max_length": "128"}
"""The adapters' setup, the dagger of table 2: one batch, rows of 128 tokens, every task afresh."""
GLUE |= of_tasks("roberta-large", MATCHED, "90.6 96.2 90.2 68.2 94.8 91.6 85.2 92.3", 786_432, way="-matched", **LARGE)
ADAPTERS = {
    ("pfeiffer", 64): (
        "10 20 20 20 10 20 20 20", "3e-5 3e-5 3e-4 3e-4 3e-4 3e-4 3e-4 3e-4", 3_171_840,
        "90.2 96.1 90.2 68.3 94.8 91.9 83.8 92.1", "",
    ),
    ("pfeiffer", 16): (
        "5 20 20 20 10 20 20 20", "3e-4", 811_392, "90.5 96.6 89.7 67.8 94.8 91.7 80.1 91.9",
        "its script: warm-up 0.1 of the steps",
    ),
    ("houlsby", 64): (
        "10 5 10 10 5 20 20 10", "3e-5 3e-4 3e-4 3e-4 3e-4 3e-4 3e-4 3e-4", 6_343_680,
        "89.9 96.2 88.7 66.5 94.7 92.1 83.4 91.0", "",
    ),
    ("houlsby", 8): (
        "10 5 10 10 5 20 20 10", "3e-4", 835_968, "90.3 96.3 87.7 66.3 94.7 91.5 72.9 91.5",
        "its script: 5 epochs, warm-up 0.1 of the steps, swish for GELU",
    ),
}  # fmt: skip
"""Epochs, rates, parameters and figures by kind and width, and what the one script that there is, MNLI's, has."""
for (_kind, _width), (_epochs, _rates, _count, _figures, _script) in ADAPTERS.items():
    _columns = {**MATCHED, "batch": "32", "epochs": _epochs, "learning_rate": _rates}
    GLUE |= of_tasks(
        "roberta-large", _columns, _figures, _count, way=f"-{_kind}{_width}", notes={"MNLI": _script},
        model=LARGE["model"], method=_kind, width=_width,
    )  # fmt: skip
DEBERTA = {
    "MNLI": ("0.15", "warm-up 1000 steps"), "SST-2": ("0", "warm-up 1000 steps"), "MRPC": ("0", "the same warm-up"),
    "CoLA": ("0.1", "warm-up 100 steps, rate 1.3e-4"), "QNLI": ("0.1", "warm-up 500 steps"),
    "QQP": ("0.2", "warm-up 10000 steps"), "RTE": ("0.2", "warm-up 50 steps, rate 2.6e-4"),
    "STS-B": ("0.2", "warm-up 100 steps"),
}  # fmt: skip
"""Dropout of the paper's head, and what the script has otherwise."""
DEBERTA_NOTE = "dropout of the paper's head: {}; r = 16 and alpha = 32 are its script's, which has {}"
GLUE |= of_tasks(
    "deberta-xxl",
    {
        "batch": "8 8 32 4 6 8 4 4", "epochs": "5 16 30 10 8 11 11 10",
        "learning_rate": "1e-4 6e-5 2e-4 1e-4 1e-4 1e-4 2e-4 2e-4", "max_length": "256 128 128 64 512 320 320 128",
        "weight_decay": "0 0.01 0.01 0 0.01 0.01 0.01 0.1",
    },
    "91.9 96.9 92.6 72.4 96.0 92.9 94.9 93.0", 4_718_592, warm=0.1,
    notes={task: DEBERTA_NOTE.format(*told) for task, told in DEBERTA.items()},
    model="microsoft/deberta-v2-xxlarge", targets=("query_proj", "value_proj"), rank=16, alpha=32.0,
    dtype="bfloat16", remat="full",
)  # fmt: skip
