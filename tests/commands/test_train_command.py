"""What a run trains on, and what it is judged on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jlora.cli import main
from jlora.commands.settings import TrainConfig, check
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


def test_the_rows_that_are_trained_on_are_not_evaluated_on():
    hub = "hub:nyu-mll/glue:rte"
    with pytest.raises(ValueError, match=r"eval_data is hub:nyu-mll/glue:rte\[train\], the rows that are trained on"):
        check(TrainConfig("m", hub, eval_data=hub, eval_split="train"))
    check(TrainConfig("m", hub, eval_data="hub:nyu-mll/glue:wnli", eval_split="train"))
