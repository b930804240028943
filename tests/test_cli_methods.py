"""`jlora train --method`: every name trains, is saved, and evaluates and generates alike from its folder."""

from __future__ import annotations

import json

import pytest

from jlora.cli import main
from tests.small import rows, small_model

# one of each kind of plumbing; tests/methods/test_named.py makes, saves and reads every name
METHODS = ["lora-plus", "pissa", "full", "p-tuning", "lora+prefix", "ia3+houlsby"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return {"model": small_model(folder / "model"), "data": rows(folder, 24)}


def result(capsys, *args):
    main(list(args))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_read(method, place, tmp_path, capsys):
    args = ["train", "--json", "--model", place["model"], "--data", place["data"], "--eval-data", place["data"]]
    args += ["--method", method, "--output", str(tmp_path), "--steps", "8", "--batch", "24", "--buckets", "1"]
    args += ["--learning-rate", "0.02", "--width", "4", "--virtual-tokens", "3", "--dimension", "300", "--samples", "1"]
    report = result(capsys, *args, "--rank", "4", "--targets", "q_proj", "v_proj", "--top-layers", "1")
    assert report["after"]["loss"] < report["before"]["loss"] - 0.05
    adapter = ["--model", place["model"], "--adapter", str(tmp_path / "adapter")]
    judged = result(capsys, "eval", "--json", "--data", place["data"], "--batch", "24", "--buckets", "1", *adapter)
    assert judged["base"]["loss"] == pytest.approx(report["before"]["loss"], abs=1e-5)
    assert judged["adapter"]["loss"] == pytest.approx(report["after"]["loss"], abs=2e-5)
