"""Hostile settings files (YAML): tags, aliases without end, other kinds, broken text."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from jlora.cli import parse
from jlora.commands.data import DataConfig, data_command
from jlora.commands.evaluate import EvalConfig, evaluate_command
from jlora.commands.settings import TrainConfig, check, read_settings
from tests.faults.guard import refused

TAGS = ["!!python/object/apply:tests.faults.guard.payload []", "!!python/object/new:tests.faults.guard.Payload {}"]
TAGS += ["!!python/name:os.system", "!!python/module:antigravity", "!!python/object:tests.faults.guard.Payload {}"]
TAGS += [
    "!!python/object/apply:os.system ['touch ran']",
    "!!binary '%%%'",
    "!unknown 3",
    "!!timestamp x",
    "!!bool x",
    "!!int x",
    "!!float x",
    "!!set {a, b}",
    "!!omap 3",
    "!!pairs x",
    "!!null x",
]
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
CASES = {
    **{f"tag {tag}": f"rank: {tag}" for tag in TAGS},
    **{f"a document tagged {tag}": f"{tag}" for tag in TAGS[:6]},
    "aliases that double": LAUGHS.replace("a59:", "rank:"),
    "aliases that double as a key": LAUGHS + "? *a59\n: 1\n",
    "an alias of itself": "rank: &a [*a]",
    "an alias of itself in targets": "targets: &a [*a]",
    "an alias of nothing": "rank: *a",
    "deep lists": "rank: " + "[" * 5000 + "]" * 5000,
    "deep tables": "rank: " + "{a: " * 3000 + "}" * 3000,
    "a list": "- rank",
    "text": "rank",
    "a number": "3",
    "two documents": "rank: 3\n---\nrank: 4",
    "a table for a number": "rank: {a: 1}",
    "a list for text": "model: [a]",
    "numbers for names": "targets: [1, 2]",
    "text for a number": "rank: many",
    "a fraction for a number": "rank: 1.5",
    "a truth for a number": "rank: true",
    "a number for a truth": "packing: 1",
    "NaN": "learning_rate: .nan",
    "infinity": "learning_rate: .inf",
    "1e999": "learning_rate: '1e999'",
    "a date": "rank: 2020-01-01",
    "no choice": "init: xavier",
    "a list for a choice": "init: [kaiming]",
    "an unknown key": "learnig_rate: 1",
    "a number for a key": "3: 4",
    "nothing for a key": "~: 4",
    "a list for a key": "? [a, b]\n: 4",
    "a key that a terminal obeys": '"\\e[2J\\nrank": 4',
    "a long key": "k" * 100_000 + ": 4",
    "an unclosed bracket": "rank: [",
    "a tab": "rank:\n\t- 3",
    "a NUL": b"rank: 3\x00",
    "not UTF-8": b"model: \xff\xfe",
    "UTF-16 cut": "rank: 3".encode("utf-16")[:7],
    "a megabyte and more": "# " + "x" * 2**20,
    "a huge number": "rank: " + "9" * 10_000,
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name, tmp_path):
    held = CASES[name]
    (tmp_path / "run.yaml").write_bytes(held if isinstance(held, bytes) else held.encode())
    refused(lambda: read_settings(TrainConfig, tmp_path / "run.yaml"), tmp_path, r"run\.yaml: ")


@pytest.mark.parametrize("name", ["rank", "batch", "steps", "learning_rate", "alpha", "warmup", "epochs", "seed"])
@pytest.mark.parametrize("value", [2**31, 10**30, -(10**30), float("nan"), float("inf")])
def test_numbers_out_of_any_range(name, value, tmp_path):
    config = TrainConfig("m", "d", **{name: value})
    refused(lambda: check(config), tmp_path, f"{name} = ")


LOW = [("batch", 0), ("buckets", 0), ("max_length", 0), ("max_length", -5), ("limit", -1), ("draws", -1), ("show", -1)]


@pytest.mark.parametrize(("name", "value"), LOW)
def test_eval_and_data_check_their_numbers_before_they_read(name, value, tmp_path):
    absent = {"model": str(tmp_path / "absent"), "data": str(tmp_path / "absent.jsonl")}
    for cls, run in ((EvalConfig, evaluate_command), (DataConfig, data_command)):
        if name in {field.name for field in dataclasses.fields(cls)}:
            config = cls(**absent, **{name: value})
            refused(lambda config=config, run=run: run(config), tmp_path, f"{name} = {value}: it must be")


def test_links_and_folders(tmp_path):
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name in ("loop.yaml", "absent.yaml", "."):
        refused(lambda name=name: parse(TrainConfig, ["--config", str(tmp_path / name)], "jlora"), tmp_path)


def test_what_is_saved_reads_back_whatever_the_text(tmp_path):
    from jlora.commands.settings import save_settings

    config = TrainConfig("m: [", "!!python/name:os.system", prompt="\x1b[2J{a}\n---\n", targets=("*a", "&b", "null"))
    save_settings(config, tmp_path / "s.yaml")
    assert TrainConfig(**read_settings(TrainConfig, tmp_path / "s.yaml")) == config
    assert yaml.safe_load((tmp_path / "s.yaml").read_text())["targets"] == ["*a", "&b", "null"]
