"""What a run trains on, and what it is judged on."""

from __future__ import annotations

import json

import pytest

from jlora.commands.settings import TrainConfig, check
from jlora.commands.train import rows_to_use


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


def test_the_rows_that_are_trained_on_are_not_evaluated_on():
    hub = "hub:nyu-mll/glue:rte"
    with pytest.raises(ValueError, match=r"eval_data is hub:nyu-mll/glue:rte\[train\], the rows that are trained on"):
        check(TrainConfig("m", hub, eval_data=hub, eval_split="train"))
    check(TrainConfig("m", hub, eval_data="hub:nyu-mll/glue:wnli", eval_split="train"))
