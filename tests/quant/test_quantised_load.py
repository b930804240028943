"""A base read a layer at a time is the base quantised whole; training, judging and merging on it by the commands."""

import json

import jax
import numpy as np
import pytest

import jlora
from jlora.cli import main
from jlora.io import load
from jlora.merging import MergedAsFloats
from tests.small import rows, small_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    return {"model": small_model(folder / "model"), "data": rows(folder), "folder": folder}


@pytest.mark.parametrize("scan", [True, False])
def test_reading_quantises_the_same_codes_and_plans_the_same_shapes(place, scan):
    plain = load(place["model"], scan_layers=scan)
    want = jlora.quantise(plain.params, "nf4", layouts=plain.layouts)
    got = load(place["model"], scan_layers=scan, quantise="nf4").params
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not isinstance(got["embed_tokens"]["embedding"], jlora.QuantisedLeaf)
    shapes = load(place["model"], scan_layers=scan, quantise="nf4", weights=False).params
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), got, shapes)


def test_qlora_by_the_commands(place, capsys):
    out = place["folder"] / "run"
    common = ["--model", place["model"], "--data", place["data"], "--quantise", "int4"]
    main(["train", *common, "--output", str(out), "--steps", "30", "--learning-rate", "0.02", "--held-out", "12"])
    report = json.loads((out / "report.json").read_text())
    assert report["before"]["exact"] <= 0.5 < 0.99 <= report["after"]["exact"]
    capsys.readouterr()
    adapter = ["--adapter", str(out / "adapter")]
    main(["eval", *common, *adapter, "--json"])
    judged = json.loads(capsys.readouterr().out)
    assert judged["adapter"]["exact"] >= 0.99
    for name, command, near in (
        ("merged", ["merge"], 0.01),  # written in bfloat16
        ("exported", ["export", "--to", "merged", "--dtype", "float32"], 1e-5),
    ):
        with pytest.warns(MergedAsFloats):
            main([*command, *common[:2], *common[4:], *adapter, "--output", str(place["folder"] / name)])
        capsys.readouterr()
        main(["eval", "--model", str(place["folder"] / name), *common[2:4], "--json"])
        merged = json.loads(capsys.readouterr().out)
        np.testing.assert_allclose(merged["base"]["loss"], judged["adapter"]["loss"], atol=near)
