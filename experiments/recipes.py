"""Recipes for the paper's own models: settings of `jlora train`, the figure to hold them against, the commands.

    python -m experiments.recipes                                  # the list
    python -m experiments.recipes show roberta-base/RTE > rte.yaml # settings, the commands and conditions on top
    python -m experiments.recipes rows dart dart-v1.1.1-full-train.json > dart.jsonl
    python -m experiments.recipes judge gpt2-medium/e2e --adapter run/adapter --data test.jsonl
    python -m experiments.recipes config > gpt3-175b/config.json   # GPT-3's sizes

None of them has been run here: the weights are not to be had, GPT-3's by nobody. The tests hold their counts of trained
parameters against the paper's on configs of the real sizes, and compile a step of each model for the chips it is meant
for. Settings and figures (dev; test for text) are those of the paper's tables, and its released scripts' where a table
says nothing; what is otherwise here, or there, is on top of each recipe.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.recipe import Recipe
from experiments.recipes_glue import GLUE
from jlora.models.gpt2 import GPT3

RECIPES = dict(GLUE)
QUERY_AND_VALUE = {"targets": ("c_attn",), "parts": "x-x"}
GPT2 = {**QUERY_AND_VALUE, "rank": 4, "alpha": 32.0, "batch": 8, "epochs": 5.0, "learning_rate": 2e-4, "clip": 0.0}
GPT2 |= {"warmup": 500, "weight_decay": 0.01, "dropout": 0.1, "label_smoothing": 0.1, "max_length": 512}
PLAIN = {"weight_decay": 0.0, "dropout": 0.0, "label_smoothing": 0.0}
"""DART's."""
MEAN = "figures are the mean of 3 seeds, each at its best epoch"
NLG = {
    "e2e": (
        {
            "data": "hub:tuetschek/e2e_nlg", "prompt": "{meaning_representation}\n->",
            "completion": " {human_reference}",
        }, {}, ("the README of its scripts: length penalty 0.8; the table's 0.9 is taken",),
    ),
    "webnlg": ({"data": "webnlg.jsonl"}, {}, ()),
    "dart": ({"data": "dart.jsonl"}, PLAIN, ()),
}  # fmt: skip
NLG_FIGURES = {
    "gpt2-medium": ("openai-community/gpt2-medium", 393_216, {
        "e2e": "BLEU 70.4, NIST 8.85, METEOR 46.8, ROUGE-L 71.8, CIDEr 2.53",
        "webnlg": "BLEU 46.7 unseen, 62.1 seen, 55.3 all", "dart": "BLEU 47.1",
    }),
    "gpt2-large": ("openai-community/gpt2-large", 737_280, {
        "e2e": "BLEU 70.4, NIST 8.89, METEOR 46.8, ROUGE-L 72.0, CIDEr 2.47",
        "webnlg": "BLEU 48.4 unseen, 64.0 seen, 57.0 all", "dart": "BLEU 47.5",
    }),
}  # fmt: skip
for _model, (_hub, _count, _figures) in NLG_FIGURES.items():
    for _set, (_rows, _more, _notes) in NLG.items():
        _judge = f"python -m experiments.recipes judge {_model}/{_set} --data test.jsonl"
        _judge += f" --adapter runs/{_model}-{_set}/adapter"
        RECIPES[f"{_model}/{_set}"] = Recipe(
            {"model": _hub, **_rows, **GPT2, **_more}, _figures[_set], _count, _judge, (MEAN, *_notes)
        )
RECIPES["llama-3-8b/alpaca"] = Recipe(
    {
        "model": "meta-llama/Meta-Llama-3-8B", "data": "hub:yahma/alpaca-cleaned", "held_out": 500,
        "rank": 16, "alpha": 32.0, "batch": 8, "max_length": 2048, "packing": True,
        "learning_rate": 2e-4, "warmup": 50, "dtype": "bfloat16", "remat": "full", "mesh": "fsdp=-1", "save_every": 50,
    },
    "none in the paper: held-out loss below the base's, in report.json and by jlora eval", 41_943_040,
    "jlora eval --model meta-llama/Meta-Llama-3-8B --adapter runs/llama-3-8b-alpaca/adapter --data held-out.jsonl",
    (
        "held-out.jsonl: docs/llama3-tpu.md writes it. The first release of Alpaca has rows with no answer, which are "
        "refused; the cleaned one should have none (not to be had here)",
    ),
)  # fmt: skip

GPT3_TASKS = {
    "WikiSQL": (384, "accuracy of the logical form", "exact", "schema and question, then the SQL"),
    "MNLI": (768, "accuracy on matched rows", "exact", "premise and hypothesis, then the label's word"),
    "SAMSum": (2048, "Rouge-1/2/L", "rouge", "a chat and an empty line, then its summary"),
}
"""Tokens a row, the figure, the metric of `jlora eval`, the rows (prompt, then completion)."""
GPT3_WAYS = {
    "lora1": (
        {"rank": 1, "alpha": 1.0, **QUERY_AND_VALUE}, 2e-4, 4_718_592, "73.4 91.7 53.8/29.8/45.9",
        "alpha is r, as the paper tells none",
    ),
    "lora8": (
        {"rank": 8, "alpha": 8.0, **QUERY_AND_VALUE}, 2e-4, 37_748_736, "74.0 91.6 53.4/29.2/45.1",
        "alpha is r, as the paper tells none",
    ),
    "full": ({"method": "full"}, 5e-6, 174_604_259_328, "73.8 89.5 52.0/28.0/44.5", "the paper prints 175,255.8M"),
    "bitfit": ({"method": "bitfit"}, 1.6e-3, 12_988_416, "71.3 91.0 51.3/27.4/43.5", "the paper prints 14.2M"),
    "preembed": (
        {"method": "prompt", "virtual_tokens": 264}, 5e-4, 3_244_032, "63.1 88.6 48.3/24.2/40.5",
        "8 of the paper's 264 stand behind the prompt, here all before it",
    ),
    "prelayer": (
        {"method": "prefix", "virtual_tokens": 16}, 1e-4, 18_874_368, "70.1 89.5 50.8/27.3/43.5",
        "8 of the paper's 16 stand behind the prompt, here all before it; it prints 20.2M",
    ),
    "houlsby1": ({"method": "houlsby", "width": 1}, 1e-4, 7_078_080, "71.9 89.8 53.0/28.9/44.8", ""),
    "houlsby8": ({"method": "houlsby", "width": 8}, 1e-4, 40_109_568, "73.2 91.5 53.2/29.0/45.1", ""),
}  # fmt: skip
"""Settings, rate, parameters, figures of the three tasks, what to know of them: tables 4 and 12."""
GPT3_BEST = {
    "MNLI-lora1": "the figure is v's alone at r = 2; q and v at r = 1 reach 91.3",
    "WikiSQL-lora8": "the figure is that of q, k, v and o at r = 4; q and v at r = 8 reach 73.8",
}
"""Of table 15, where table 4 has the best of several ways to spend the parameters."""
FOLDER = "GPT-3's weights are not public: gpt3-175b is a folder of GPT-2's tokenizer and config.json by `python -m "
FOLDER += "experiments.recipes config`, enough to dry-run and compile it"
PLAN = "by formula: jlora plan --model gpt3-175b --topology v5p:4x4x8 --batch 128 --seq {} --rank {} --targets c_attn"
for _way, (_settings, _rate, _count, _figures, _note) in GPT3_WAYS.items():
    for (_task, (_length, _metric, _by, _rows)), _figure in zip(GPT3_TASKS.items(), _figures.split(), strict=True):
        _name, _data = f"gpt3-175b/{_task}-{_way}", f"{_task.lower()}.jsonl"
        _judge = f"jlora eval --model gpt3-175b --adapter runs/gpt3-175b-{_task}-{_way}/adapter --data dev.jsonl"
        _notes = [FOLDER, f"{_data}: {_rows}", _note, GPT3_BEST.get(f"{_task}-{_way}", "")]
        _notes += [PLAN.format(_length, _settings["rank"])] if "rank" in _settings else []
        _room = GPT3["175b"].n_positions - _settings.get("virtual_tokens", 0)
        RECIPES[_name] = Recipe(
            {
                "model": "gpt3-175b", "data": _data, **_settings, "learning_rate": _rate, "batch": 128, "epochs": 2.0,
                "warmup": max(1, round(250_000 / (128 * _length))), "weight_decay": 0.1,
                "max_length": min(_length, _room),
                "dtype": "bfloat16", "remat": "full", "mesh": "fsdp=-1",
            },
            f"{_metric} {_figure}", _count, f"{_judge} --metrics {_by}", tuple(filter(None, _notes)), "v5p-256",
        )  # fmt: skip


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
    """What is asked for: list, show NAME, rows webnlg|dart FILE, judge NAME --adapter FOLDER --data FILE, config."""

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
                print(f"{name:32} {recipe.trained:>15,}  {recipe.expected}")
        case ("show", name) if name in RECIPES:
            print(RECIPES[name].text(name), end="")
        case ("config",):
            print(json.dumps(GPT3["175b"].to_hf(), indent=2))
        case ("rows", kind, file):
            sys.stdout.write(write_rows(kind, file))
        case ("judge", name) if name in RECIPES:
            print(json.dumps(judge(name, command.adapter, command.data, command.model)))
        case _:
            raise ValueError(f"{' '.join(command.words)!r}: see --help; recipes are {', '.join(RECIPES)}")


if __name__ == "__main__":
    main(tyro.cli(Command))
