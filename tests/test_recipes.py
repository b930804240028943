"""The recipes for the paper's models: a dry run on configs of the real sizes trains as many numbers as the paper."""

import dataclasses
import json

import pytest
import yaml

from experiments.counts import CONFIGS
from experiments.recipes import RECIPES, TOPOLOGIES, text, write_rows
from jlora.commands.settings import TrainConfig, check, read_settings
from jlora.commands.train import train
from jlora.plan.known import MODELS
from tests.small import tokenizer

REAL = {"roberta-base": "RoBERTa-base", "roberta-large": "RoBERTa-large", "deberta-xxl": "DeBERTa-XXL"}
REAL |= {"gpt2-medium": "GPT-2 M", "gpt2-large": "GPT-2 L"}
TASKS = {"roberta-base/RTE": 2, "roberta-large/CoLA": 2, "deberta-xxl/STS-B": 1, "gpt2-medium/e2e": 0}
TASKS |= {"gpt2-large/dart": 0, "llama-3-8b/alpaca": 0}
"""With the number of the head's outputs; one of each model."""


def folder_of(model, place):
    """config.json of the real size, and a tokenizer of a few words; no weights."""
    place.mkdir(parents=True)
    hub = MODELS[model] if model in MODELS else dataclasses.asdict(CONFIGS[REAL[model]])
    hub = {name: value for name, value in hub.items() if name != "num_labels"}
    if model == "deberta-xxl":  # as the Hub's file has them
        hub |= {"norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "max_relative_positions": -1}
    (place / "config.json").write_text(json.dumps(hub))
    tokenizer().save_pretrained(place)
    return place


def rows_of(name, place):
    line = {"sentence1": "good film", "sentence2": "bad film", "label": 0}
    if name.endswith("e2e"):
        line = {"meaning_representation": "good film", "human_reference": "fine"}
    elif TASKS[name] == 0:
        line = {"prompt": "Review : good", "completion": " fine"}
    labels = [0.5, 1.5] if name.endswith("STS-B") else range(max(TASKS[name], 1))
    lines = [{**line, "label": n} if "label" in line else line for n in labels] * 4
    place.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return place


def head_of(model, outputs):
    """Numbers in the head that trains whole."""
    if not outputs:
        return 0
    d = {"roberta-base": 768, "roberta-large": 1024, "deberta-xxl": 1536}[model]
    return d * d + d + outputs * (d + 1)  # RoBERTa's own layer, or DeBERTa's pooler, which its checkpoint lacks


def dry(name, place, **more):
    model, data = folder_of(name.split("/")[0], place / "model"), rows_of(name, place / "rows.jsonl")
    given = {"model": str(model), "data": str(data), "held_out": 0, "steps": 10, "dry_run": True, **more}
    return train(dataclasses.replace(RECIPES[name].config, **given))


@pytest.mark.parametrize("name", TASKS)
def test_dry_run_of_the_real_size(name, tmp_path):
    found, recipe = dry(name, tmp_path), RECIPES[name]
    assert found["dry_run"]
    assert found["trained_parameters"] - head_of(name.split("/")[0], TASKS[name]) == recipe.trained


@pytest.mark.parametrize("name", TASKS)
def test_its_step_is_compiled_for_its_chips(name, tmp_path):
    pytest.importorskip("libtpu", reason='pip install "jlora[tpu]" brings the compiler')
    topology = TOPOLOGIES[RECIPES[name].chips]
    found = dry(name, tmp_path, topology=topology)
    chips, held, told = int(RECIPES[name].chips.rpartition("-")[2]), found["bytes"], found["compiled"]
    # the base split over the chips, factors and their state as the rules say, between whole and split
    whole = held["trained"] + held["optimiser"]
    assert held["frozen"] / chips <= told["arguments"] * 1.02 <= (held["frozen"] / chips + whole) * 1.1
    assert told["estimated_cycles"] > 0 and (chips == 1 or told["collectives"]["all-reduce"] > 0)


def test_a_gpu_is_not_compiled_for(tmp_path):
    with pytest.raises(ValueError, match="h100:8 is no TPU"):
        dry("gpt2-medium/e2e", tmp_path, topology="h100:8")
    with pytest.raises(ValueError, match="give dry_run too"):
        dry("gpt2-medium/e2e", tmp_path / "again", topology="v5e:2x4", dry_run=False)


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_read_again(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text(name))
    config = TrainConfig(**read_settings(TrainConfig, path))
    check(config)
    assert config == RECIPES[name].config and yaml.safe_load(text(name))["model"] == config.model


def test_averages_are_the_papers():
    for model, average in (("roberta-base", 87.2), ("roberta-large", 89.0), ("deberta-xxl", 91.3)):
        figures = [float(r.expected.split()[1]) for name, r in RECIPES.items() if name.startswith(model + "/")]
        assert len(figures) == 8 and abs(sum(figures) / 8 - average) <= 0.0501


def test_rows_of_the_releases(tmp_path):
    entry = {"modifiedtripleset": [{"subject": "Aarhus", "property": "leader_Name", "object": "J_B"}]}
    entry["lexicalisations"] = [{"lex": "J B leads Aarhus."}, {"lex": "Aarhus has J B."}]
    (tmp_path / "w.json").write_text(json.dumps({"entries": [{"1": entry}]}))
    dart = [{"tripleset": [["a", "b", "c"], ["d", "e", "f"]], "annotations": [{"text": "t"}]}]
    (tmp_path / "d.json").write_text(json.dumps(dart))
    web = [json.loads(line) for line in write_rows("webnlg", tmp_path / "w.json").splitlines()]
    assert [row["completion"] for row in web] == [" J B leads Aarhus.", " Aarhus has J B."]
    assert {row["prompt"] for row in web} == {"Aarhus : leader Name : J B\n->"}
    assert json.loads(write_rows("dart", tmp_path / "d.json"))["prompt"] == "a : b : c | d : e : f\n->"
