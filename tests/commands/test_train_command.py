"""What a run trains on, and what it is judged on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from jlora.cli import main
from jlora.commands.settings import TrainConfig, check
from jlora.commands.sweep import SweepConfig, trials_of
from jlora.commands.train import rows_to_use
from tests.small import rows, small_model

FILES = {"adapter": "adapter", "plot": "plot.png", "page": "report.html"}


@pytest.mark.filterwarnings("ignore")
def test_a_hub_set_is_evaluated_on_another_split(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for split in ("train", "test", "validation"):
        lines = (json.dumps({"prompt": f"{split} {n}", "completion": "c"}) + "\n" for n in range(3))
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(lines))
    hub = f"hub:{tmp_path / 'set'}"
    for more, split in (({}, "test"), ({"eval_split": "validation"}, "validation")):
        config = TrainConfig("m", hub, eval_data=hub, limit=2, **more)
        check(config)
        training, judged = rows_to_use(config)
        assert [row.prompt for row in training] == ["train 0", "train 1"]
        assert [row.prompt for row in judged] == [f"{split} {n}" for n in range(3)]


def test_a_remote_run_tells_where_its_files_are_in_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jlora.commands.folder.remote", lambda output: True)
    out = tmp_path / "run"
    args = ["--data", rows(tmp_path, 8), "--output", str(out), "--steps", "1", "--batch", "4", "--buckets", "1"]
    main(["train", "--json", "--model", small_model(tmp_path / "model"), *args])
    for report in (json.loads(capsys.readouterr().out), json.loads((out / "report.json").read_text())):
        told = {name: report.get(name) for name in ("adapter", "plot", "page") if name in report}
        assert told == {name: str(out / file) for name, file in FILES.items() if name in told}
        assert "adapter" in told and all(Path(path).exists() for path in told.values())


def test_a_forced_resumption_is_not_kept_in_the_settings(tmp_path):
    out = tmp_path / "run"
    args = ["--data", rows(tmp_path, 8), "--output", str(out), "--steps", "1", "--batch", "4", "--buckets", "1"]
    args = ["train", "--model", small_model(tmp_path / "model"), "--samples", "0", *args]
    main(args)
    main([*args, "--resume", "--force", "--learning-rate", "0.1"])
    held = yaml.safe_load((out / "settings.yaml").read_text())
    assert (held["learning_rate"], held["resume"], held["force"]) == (0.1, False, False)


def test_the_first_and_last_evaluations_are_written_down_and_count_when_a_run_is_extended(tmp_path):
    out, data = tmp_path / "run", rows(tmp_path, 8)
    args = ["train", "--model", small_model(tmp_path / "model"), "--data", data, "--eval-data", data, "--warmup", "0"]
    args += ["--output", str(out), "--eval-every", "3", "--batch", "8", "--buckets", "1", "--samples", "0"]

    def left():
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        found = {line["step"]: (line["loss"], line.get("kept")) for line in lines if line["kind"] == "eval"}
        return json.loads((out / "report.json").read_text()), found, files(out / "best")

    main([*args, "--steps", "4", "--learning-rate", "0.02"])
    report, found, best = left()
    losses = {step: loss for step, (loss, _) in found.items()}
    assert found == {0: (report["before"]["loss"], None), 3: (losses[3], True), 4: (report["after"]["loss"], True)}
    assert report["best"] == {"step": 4, "loss": losses[4]}
    main([*args, "--steps", "6", "--learning-rate", "3", "--resume", "--force"])
    again, found, still = left()
    assert found[6][0] > losses[4]
    assert found[6] == (again["after"]["loss"], False) and [*found] == [0, 3, 4, 6]
    assert again["best"] == report["best"] and still == best


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_takes_no_other_run_s_folder_but_when_told(tmp_path, capsys):
    out, kept = tmp_path / "run", tmp_path / "run" / "notes.txt"
    args = ["--data", rows(tmp_path, 8), "--output", str(out), "--batch", "4", "--buckets", "1", "--samples", "0"]
    args = ["train", "--model", small_model(tmp_path / "model"), *args]
    main([*args, "--steps", "2", "--eval-data", str(tmp_path / "rows.jsonl"), "--eval-every", "1"])
    kept.write_text("mine")
    held = files(out)

    def refused(*more):
        with pytest.raises(SystemExit, match="1"):
            main([*args, "--steps", "2", *more])
        assert files(out) == held
        return capsys.readouterr().err

    assert "run holds a run (settings.yaml, adapter, best, checkpoints): --resume goes on with it" in refused()
    assert "give one of them" in refused("--resume", "--overwrite")
    assert "adapter = " in (said := refused("--adapter", str(out / "adapter"), "--overwrite")) and "empties" in said
    assert "no such data file" in refused("--overwrite", "--data", "nowhere.jsonl")  # which is found out before
    main([*args, "--steps", "1", "--overwrite"])
    assert kept.exists() and not (out / "best").exists() and (out / "adapter").exists()
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()] == ["1"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert yaml.safe_load((out / "settings.yaml").read_text())["overwrite"] is False
    shutil.rmtree(out / "checkpoints")
    held = files(out)
    assert "run holds a run (adapter): give another --output" in refused("--resume")
    shutil.rmtree(out / "adapter")  # as if killed before the first checkpoint
    main([*args, "--steps", "1", "--resume"])


def test_a_sweep_takes_no_other_run_s_folder_but_when_told(tmp_path, capsys):
    out = tmp_path / "sweep"
    args = ["sweep", "--model", small_model(tmp_path / "model"), "--data", rows(tmp_path, 8), "--output", str(out)]
    args += ["--batch", "4", "--buckets", "1", "--steps", "1"]
    main([*args, "--grid", "rank=1,2"])
    held = files(out)
    with pytest.raises(SystemExit, match="1"):
        main([*args, "--grid", "rank=3,4"])
    assert "sweep holds a run (metrics.jsonl, report.json)" in capsys.readouterr().err and files(out) == held
    main([*args, "--grid", "rank=3,4", "--overwrite"])
    assert yaml.safe_load((out / "1-rank=4" / "settings.yaml").read_text())["overwrite"] is False


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_an_export_overwrites_nothing(form, tmp_path, capsys):
    out = tmp_path / "out"
    if form == "peft":
        out.mkdir()
    held = out / "adapter_config.json" if form == "peft" else out
    held.write_text("mine")
    with pytest.raises(SystemExit, match="1"):  # before anything is read
        main(["export", "--model", "no/model", "--adapter", "none", "--output", str(out), "--to", form])
    assert f"{out} exists" in capsys.readouterr().err and held.read_text() == "mine"


def test_every_seed_and_every_trial_of_a_sweep_is_judged_on_the_same_rows(tmp_path):
    data = rows(tmp_path, 40)
    split = lambda config: [[row.where for row in part] for part in rows_to_use(config)]
    sweep = SweepConfig("m", data, held_out=8, grid=("seed=0,1,2", "rank=2,4"))
    first, *others = [split(trial) for _, trial in trials_of(sweep)]
    assert len(first[1]) == 8 and all(other == first for other in others)
    assert split(TrainConfig("m", data, held_out=8, held_out_seed=1))[1] != first[1]


def test_the_rows_that_are_trained_on_are_not_evaluated_on():
    hub = "hub:nyu-mll/glue:rte"
    with pytest.raises(ValueError, match=r"eval_data is hub:nyu-mll/glue:rte\[train\], the rows that are trained on"):
        check(TrainConfig("m", hub, eval_data=hub, eval_split="train"))
    check(TrainConfig("m", hub, eval_data="hub:nyu-mll/glue:wnli", eval_split="train"))
