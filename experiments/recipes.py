"""Recipes for the paper's own models: settings of `jlora train`, the figure to hold them against, the commands.

    python -m experiments.recipes                                  # the list
    python -m experiments.recipes show roberta-base/RTE > rte.yaml # settings, with the commands on top
    python -m experiments.recipes rows dart dart-v1.1.1-full-train.json > dart.jsonl
    python -m experiments.recipes judge gpt2-medium/e2e --adapter run/adapter --data test.jsonl

None of them has been run here: the weights are not to be had. The tests hold their counts of trained parameters
against the paper's on configs of the real sizes, and compile a step of each model for the chips it is meant for.
Settings and figures (dev; test for text) are the paper's and its released scripts': batches are a GPU's, of the eight
that those scripts ask for. MRPC, RTE and STS-B start afresh; the paper starts them from MNLI's adapter, whose head has
another number of classes, which `jlora train --adapter` does not exchange.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from jlora.commands.settings import TrainConfig

ROWS = {"MNLI": 392_702, "SST-2": 67_349, "MRPC": 3_668, "CoLA": 8_551, "QNLI": 104_743, "QQP": 363_846}
ROWS |= {"RTE": 2_490, "STS-B": 5_749}
"""GLUE's training rows."""
HUB = {"MNLI": "mnli", "SST-2": "sst2", "MRPC": "mrpc", "CoLA": "cola", "QNLI": "qnli", "QQP": "qqp", "RTE": "rte"}
HUB |= {"STS-B": "stsb"}
HEAD = """# jlora train --config {file} --output runs/{name}
# then: {judge}
# on a TPU VM: TYPE={chips} experiments/cloud/vm.sh with {file} in train.yaml's place
# compiled for it before, with no TPU and no weights: jlora train --config {file} --dry-run --topology {topology}
"""
TOPOLOGIES = {"v5litepod-8": "v5e:2x4", "v5litepod-4": "v5e:2x2", "v5litepod-1": "v5e:1"}
GLUE_EVAL = "jlora eval --model {model} --adapter runs/{name}/adapter --data {data} --split {split}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings; the paper's figure; how many parameters train, the head's left out."""

    settings: dict[str, Any]
    expected: str
    trained: int
    judge: str
    note: str = ""

    @property
    def chips(self) -> str:
        """The most chips of a host that a batch splits into."""
        return next(name for name in TOPOLOGIES if self.config.batch % int(name.rpartition("-")[2]) == 0)

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(**self.settings)


def glue_recipes(
    model: str, hub: str, columns: dict[str, tuple[int, int, float, int]], figures: str, trained: int, **same: Any
) -> dict[str, Recipe]:
    """columns: {task: (batch, epochs, learning rate, length)}. figures: the paper's, in the tasks' order."""
    out = {}
    for (task, (batch, epochs, rate, length)), figure in zip(columns.items(), figures.split(), strict=True):
        metric = {"CoLA": "Matthews", "STS-B": "Pearson"}.get(task, "accuracy")
        steps = epochs * math.ceil(ROWS[task] / batch)
        settings = {
            "model": hub, "data": f"hub:nyu-mll/glue:{HUB[task]}", "batch": batch, "epochs": float(epochs),
            "learning_rate": rate, "max_length": length, "warmup": round(0.06 * steps), "buckets": 4, **same,
        }  # fmt: skip
        split = "validation_matched" if task == "MNLI" else "validation"
        judge = GLUE_EVAL.format(model=hub, name=f"{model}-{task}", data=settings["data"], split=split)
        out[f"{model}/{task}"] = Recipe(settings, f"{metric} {figure}", trained, judge)
    return out


def columns(batch: str, epochs: str, rates: str, lengths: str) -> dict[str, tuple[int, int, float, int]]:
    parts = [batch.split(), epochs.split(), rates.split(), lengths.split()]
    each = zip(ROWS, *parts, strict=True)
    return {task: (int(b), int(e), float(rate), int(length)) for task, b, e, rate, length in each}


ROBERTA = {"targets": ("query", "value"), "rank": 8, "weight_decay": 0.1}
RECIPES = glue_recipes(
    "roberta-base", "FacebookAI/roberta-base",
    columns(
        "16 16 16 32 32 16 32 16", "30 60 30 80 25 25 80 40", "5e-4 5e-4 4e-4 4e-4 4e-4 5e-4 5e-4 4e-4", "512 " * 8
    ),
    "87.5 95.1 89.7 63.4 93.3 90.8 86.6 91.5", 294_912, alpha=8.0, **ROBERTA,
)  # fmt: skip
RECIPES |= glue_recipes(
    "roberta-large", "FacebookAI/roberta-large",
    columns(
        "4 8 4 4 4 4 8 4", "10 10 20 20 10 20 20 10", "3e-4 4e-4 3e-4 3e-4 2e-4 3e-4 4e-4 3e-4",
        "128 512 512 128 512 512 512 128",
    ),
    "90.6 96.2 90.9 68.2 94.9 91.6 87.4 92.6", 786_432, alpha=16.0, **ROBERTA,
)  # fmt: skip
RECIPES |= glue_recipes(
    "deberta-xxl", "microsoft/deberta-v2-xxlarge",
    columns(
        "8 8 32 4 6 8 4 4", "5 16 30 10 8 11 11 10", "1e-4 6e-5 2e-4 1.3e-4 1e-4 1e-4 2.6e-4 2e-4",
        "256 128 128 64 512 320 320 128",
    ),
    "91.9 96.9 92.6 72.4 96.0 92.9 94.9 93.0", 4_718_592, targets=("query_proj", "value_proj"), rank=16, alpha=32.0,
    weight_decay=0.01, dtype="bfloat16", remat="full",
)  # fmt: skip

GPT2 = {"targets": ("c_attn",), "rank": 4, "alpha": 32.0, "batch": 8, "epochs": 5.0, "learning_rate": 2e-4}
GPT2 |= {"warmup": 500, "weight_decay": 0.01, "dropout": 0.1, "label_smoothing": 0.1, "max_length": 512}
PLAIN = {"weight_decay": 0.0, "dropout": 0.0, "label_smoothing": 0.0}
"""DART's."""
FUSED = "one pair of factors for c_attn, query, key and value in one: as many numbers as the paper's two pairs have"
NLG = {
    "e2e": (
        {
            "data": "hub:tuetschek/e2e_nlg", "prompt": "{meaning_representation}\n->",
            "completion": " {human_reference}",
        }, {},
    ),
    "webnlg": ({"data": "webnlg.jsonl"}, {}),
    "dart": ({"data": "dart.jsonl"}, PLAIN),
}  # fmt: skip
NLG_FIGURES = {
    "gpt2-medium": ("openai-community/gpt2-medium", 393_216, {
        "e2e": "BLEU 70.4, NIST 8.85, METEOR 46.8, ROUGE-L 71.8, CIDEr 2.53",
        "webnlg": "BLEU 46.7 unseen, 62.1 seen, 55.3 all", "dart": "BLEU 47.1",
    }),
    "gpt2-large": ("openai-community/gpt2-large", 737_280, {
        "e2e": "BLEU 70.4", "webnlg": "BLEU 48.4 unseen, 64.0 seen, 57.0 all", "dart": "BLEU 47.5",
    }),
}  # fmt: skip
for _model, (_hub, _count, _figures) in NLG_FIGURES.items():
    for _set, (_rows, _more) in NLG.items():
        _judge = f"python -m experiments.recipes judge {_model}/{_set} --data test.jsonl"
        _judge += f" --adapter runs/{_model}-{_set}/adapter"
        RECIPES[f"{_model}/{_set}"] = Recipe(
            {"model": _hub, **_rows, **GPT2, **_more}, _figures[_set], _count, _judge, note=FUSED
        )
RECIPES["llama-3-8b/alpaca"] = Recipe(
    {
        "model": "meta-llama/Meta-Llama-3-8B", "data": "hub:yahma/alpaca-cleaned", "held_out": 500,
        "rank": 16, "alpha": 32.0, "batch": 8, "max_length": 2048, "packing": True,
        "learning_rate": 2e-4, "warmup": 50, "dtype": "bfloat16", "remat": "full", "mesh": "fsdp=-1", "save_every": 50,
    },
    "none in the paper: held-out loss below the base's, in report.json and by jlora eval", 41_943_040,
    "jlora eval --model meta-llama/Meta-Llama-3-8B --adapter runs/llama-3-8b-alpaca/adapter --data held-out.jsonl",
    note="held-out.jsonl: docs/llama3-tpu.md writes it. The first release of Alpaca has rows with no answer, which are "
    "refused; the cleaned one should have none (not to be had here)",
)  # fmt: skip
GPT3_PLAN = "jlora plan --model gpt3-175b --rank 4 --targets c_attn --topology v5p:4x4x8 --batch 128 --seq 2048"
"""GPT-3's weights are not public: its shapes are planned (and compiled, with --compile), not trained."""


def text(name: str) -> str:
    """The recipe as a settings file with its commands on top."""
    recipe = RECIPES[name]
    flat = name.replace("/", "-")
    top = HEAD.format(
        file=f"{flat}.yaml", name=flat, judge=recipe.judge, chips=recipe.chips, topology=TOPOLOGIES[recipe.chips]
    )
    top += f"# the paper: {recipe.expected}; trained parameters without a head: {recipe.trained:,}\n"
    top += f"# {recipe.note}\n" if recipe.note else ""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.settings.items()}
    return top + yaml.safe_dump(plain, sort_keys=False)


def write_rows(kind: str, file: str) -> str:
    """A file of WebNLG or DART, as released, as JSONL of prompt and completion."""
    from experiments.paper.e2e import dart_rows, webnlg_rows

    read = {"webnlg": webnlg_rows, "dart": dart_rows}
    if kind not in read:
        raise ValueError(f"{kind!r} is none of {', '.join(read)}")
    rows = read[kind](json.loads(Path(file).read_text(encoding="utf-8")))
    return "".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in rows)


def judge(name: str, adapter: str, data: str, model: str = "") -> dict[str, float]:
    """The five figures of a text recipe's adapter on rows: beam 10, no 4-gram twice, the paper's length penalty.

    model: a folder in the recipe's model's place.
    """
    import jlora
    from experiments.paper.e2e import answers
    from experiments.paper.nlg import scores
    from jlora.commands.written import questions
    from jlora.data import Columns, read_rows
    from jlora.generate import GenerateConfig
    from jlora.io import load
    from jlora.io.adapters import load_adapter

    config = RECIPES[name].config
    asked = questions(read_rows(data, columns=Columns(prompt=config.prompt, completion=config.completion)))
    base = load(model or config.model)
    frozen, lora, _ = load_adapter(base, adapter)
    penalty = 0.9 if name.endswith("e2e") else 0.8
    how = GenerateConfig(max_new_tokens=64, beams=10, length_penalty=penalty, no_repeat_ngram=4)
    return scores(answers(base, jlora.combine(frozen, lora), list(asked), how, 16), list(asked.values()))


@dataclasses.dataclass(frozen=True)
class Command:
    """What is asked for: list, show NAME, rows webnlg|dart FILE, judge NAME --adapter FOLDER --data FILE."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ("list",)
    adapter: str = ""
    data: str = ""
    model: str = ""
    """A folder in the recipe's model's place."""


def main(command: Command) -> None:
    """Print it. Raises ValueError for what is not known."""
    match command.words:
        case ("list",):
            for name, recipe in RECIPES.items():
                print(f"{name:24} {recipe.trained:>12,}  {recipe.expected}")
            print(f"GPT-3: {GPT3_PLAN}")
        case ("show", name) if name in RECIPES:
            print(text(name), end="")
        case ("rows", kind, file):
            sys.stdout.write(write_rows(kind, file))
        case ("judge", name) if name in RECIPES:
            print(json.dumps(judge(name, command.adapter, command.data, command.model)))
        case _:
            raise ValueError(f"{' '.join(command.words)!r}: see --help; recipes are {', '.join(RECIPES)}")


if __name__ == "__main__":
    main(tyro.cli(Command))
