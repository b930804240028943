"""The recipes for the paper's models: a dry run on configs of the real sizes trains as many numbers as the paper."""

import dataclasses
import json
import math

import pytest
import yaml

from experiments.counts import CONFIGS
from experiments.counts import ROWS as COUNTED
from experiments.counts import trained as counted
from experiments.recipe import TOPOLOGIES
from experiments.recipes import GPT3_WAYS, RECIPES, write_rows
from experiments.recipes_glue import ADAPTERS, ROWS
from jlora.commands.settings import TrainConfig, check, read_settings
from jlora.commands.train import train
from jlora.plan.known import MODELS, config_of
from jlora.plan.known import topology as topology_of
from tests.small import tokenizer

REAL = {"roberta-base": "RoBERTa-base", "roberta-large": "RoBERTa-large", "deberta-xxl": "DeBERTa-XXL"}
REAL |= {"gpt2-medium": "GPT-2 M", "gpt2-large": "GPT-2 L", "gpt3-175b": "GPT-3 175B"}
TASKS = {"roberta-base/RTE": 2, "roberta-large/CoLA": 2, "deberta-xxl/STS-B": 1, "gpt2-medium/e2e": 0}
TASKS |= {"gpt2-large/dart": 0, "llama-3-8b/alpaca": 0}
"""With the number of the head's outputs; one of each model."""
MORE = {"roberta-large/RTE-pfeiffer16": 2, "roberta-large/RTE-houlsby64": 2, "gpt3-175b/SAMSum-lora8": 0}
OUTPUTS = TASKS | MORE
ON_V5P = {"gpt2-medium/e2e": {}, "gpt3-175b/SAMSum-lora8": {"n_layer": 2}}
"""Compiled for eight chips of v5p, with these sizes changed: the whole of GPT-3 for 128 takes a minute."""


def folder_of(model, place, **sizes):
    """config.json of the real size, and a tokenizer of a few words; no weights."""
    place.mkdir(parents=True)
    hub = MODELS[model] if model in MODELS else dataclasses.asdict(CONFIGS[REAL[model]])
    hub = {name: value for name, value in hub.items() if name != "num_labels"} | sizes
    if model == "deberta-xxl":  # as the Hub's file has them
        hub |= {"norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "max_relative_positions": -1}
    (place / "config.json").write_text(json.dumps(hub))
    tokenizer().save_pretrained(place)
    return place


def rows_of(name, place):
    line = {"sentence1": "good film", "sentence2": "bad film", "label": 0}
    if name.endswith("e2e"):
        line = {"meaning_representation": "good film", "human_reference": "fine"}
    elif OUTPUTS[name] == 0:
        line = {"prompt": "Review : good", "completion": " fine"}
    labels = [0.5, 1.5] if name.endswith("STS-B") else range(max(OUTPUTS[name], 1))
    lines = [{**line, "label": n} if "label" in line else line for n in labels] * 4
    place.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return place


def head_of(model, outputs):
    """Numbers in the head that trains whole."""
    if not outputs:
        return 0
    d = {"roberta-base": 768, "roberta-large": 1024, "deberta-xxl": 1536}[model]
    return d * d + d + outputs * (d + 1)  # RoBERTa's own layer, or DeBERTa's pooler, which its checkpoint lacks


def dry(name, place, sizes=None, **more):
    model = folder_of(name.split("/")[0], place / "model", **(sizes or {}))
    given = {"model": str(model), "data": str(rows_of(name, place / "rows.jsonl")), "held_out": 0, "steps": 10}
    return train(dataclasses.replace(RECIPES[name].config, **given, **{"dry_run": True, **more}))


@pytest.mark.parametrize("name", OUTPUTS)
def test_dry_run_of_the_real_size(name, tmp_path):
    found, recipe = dry(name, tmp_path), RECIPES[name]
    assert found["dry_run"]
    assert found["trained_parameters"] - head_of(name.split("/")[0], OUTPUTS[name]) == recipe.trained


def compiled(name, place, topology, **more):
    """The step is compiled, its base split over the chips, and what it trains whole or split as the rules say."""
    pytest.importorskip("libtpu", reason='pip install "jlora[tpu]" brings the compiler')
    found = dry(name, place, topology=topology, **more)
    chips, held, told = topology_of(topology).devices, found["bytes"], found["compiled"]
    whole = held["trained"] + held["optimiser"]
    assert held["frozen"] / chips <= told["arguments"] * 1.02 <= (held["frozen"] / chips + whole) * 1.1
    assert told["estimated_cycles"] > 0 and (chips == 1 or told["collectives"]["all-reduce"] > 0)


@pytest.mark.parametrize("name", TASKS)
def test_its_step_is_compiled_for_its_chips(name, tmp_path):
    compiled(name, tmp_path, TOPOLOGIES[RECIPES[name].chips])


@pytest.mark.parametrize("name", ON_V5P)
def test_its_step_is_compiled_for_v5p(name, tmp_path):
    compiled(name, tmp_path, "v5p:2x2x2", sizes=ON_V5P[name], batch=8)


def test_gpt3_trains_what_is_counted_for_the_tables():
    rows = {"lora1": "LoRA r=1, q v", "lora8": "LoRA r=8, q v", "bitfit": "BitFit", "full": "full"}
    rows |= {"preembed": "prefix-embedding, 256 + 8", "prelayer": "prefix-layer, 8 + 8"}
    rows |= {"houlsby1": "adapter (Houlsby) r=1", "houlsby8": "adapter (Houlsby) r=8"}
    make = {row.what: row.make for row in COUNTED if row.model == "GPT-3 175B"}
    assert {way: counted("GPT-3 175B", make[rows[way]]) for way in GPT3_WAYS} == {
        way: told[2] for way, told in GPT3_WAYS.items()
    }
    lengths = {RECIPES[f"gpt3-175b/{task}-lora8"].config.max_length for task in ("WikiSQL", "MNLI", "SAMSum")}
    assert lengths == {384, 768, 2048} and config_of("gpt3-175b").n_positions == 2048
    assert RECIPES["gpt3-175b/MNLI-full"].config.warmup == 3  # 250,000 tokens of 128 rows of 768
    for name in (f"gpt3-175b/SAMSum-{way}" for way in ("preembed", "prelayer")):
        config = RECIPES[name].config
        assert config.max_length + config.virtual_tokens == 2048
    best = {
        name
        for name, recipe in RECIPES.items()
        if any("the figure is " in note and " r = " in note for note in recipe.notes)
    }
    assert best == {"gpt3-175b/MNLI-lora1", "gpt3-175b/WikiSQL-lora8"}


def test_a_gpu_is_not_compiled_for(tmp_path):
    with pytest.raises(ValueError, match="h100:8 is no TPU"):
        dry("gpt2-medium/e2e", tmp_path, topology="h100:8")
    with pytest.raises(ValueError, match="give dry_run too"):
        dry("gpt2-medium/e2e", tmp_path / "again", topology="v5e:2x4", dry_run=False)


def test_settings_are_read_again(tmp_path):
    path = tmp_path / "recipe.yaml"
    for name, recipe in RECIPES.items():
        path.write_text(recipe.text(name))
        config = TrainConfig(**read_settings(TrainConfig, path))
        check(config)
        assert config == recipe.config and yaml.safe_load(path.read_text())["model"] == config.model


AVERAGES = {("roberta-base", ""): 87.2, ("roberta-large", ""): 89.0, ("deberta-xxl", ""): 91.3}
AVERAGES |= {("roberta-large", "-matched"): 88.6, ("roberta-large", "-pfeiffer64"): 88.4}
AVERAGES |= {("roberta-large", "-pfeiffer16"): 87.9, ("roberta-large", "-houlsby64"): 87.8}
AVERAGES |= {("roberta-large", "-houlsby8"): 86.4}


def test_averages_are_the_papers():
    assert len(AVERAGES) == 4 + len(ADAPTERS)
    for (model, way), average in AVERAGES.items():
        figures = [float(RECIPES[f"{model}/{task}{way}"].expected.split()[1]) for task in ROWS]
        assert abs(sum(figures) / 8 - average) <= 0.0501


@pytest.mark.parametrize(("model", "way"), AVERAGES)
def test_a_figure_comes_with_its_conditions(model, way):
    for task, rows in ROWS.items():
        name = f"{model}/{task}{way}"
        told, config = RECIPES[name].text(name), RECIPES[name].config
        assert ("starts afresh" in told) == (not way and task in ("MRPC", "RTE", "STS-B"))
        assert ("matched and mismatched" in told) == (task == "MNLI")
        assert "median of 5 seeds" in told and "jlora's none" in told
        share = 0.1 if model == "deberta-xxl" else 0.06
        assert config.warmup == pytest.approx(share * config.epochs * math.ceil(rows / config.batch), abs=0.51)
        if model == "deberta-xxl":
            assert config.weight_decay == {"MNLI": 0, "CoLA": 0, "STS-B": 0.1}.get(task, 0.01)


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
