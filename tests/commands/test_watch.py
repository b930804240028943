"""What is seen of a run, when the run ends in the middle of it."""

import json

import numpy as np
import pytest

from jlora.commands.settings import TrainConfig
from jlora.commands.watch import Watch


class Killed(BaseException):
    """What no code catches, as SIGKILL."""


def test_a_best_adapter_that_is_not_saved_is_not_recorded(tmp_path):
    def killed(*_):
        raise Killed

    config = TrainConfig("m", "d", output=str(tmp_path), eval_every=3)
    with pytest.raises(Killed):
        Watch(config, tmp_path, 0, killed).evaluated(3, {"loss": 1.0}, None)
    saved, published = [], []
    save = lambda folder, trained, card: saved.append(card) or folder
    again = Watch(config, tmp_path, 3, save, lambda: published.append(1))
    assert again.due(3)  # so a run that goes on judges, and saves, once more
    for step, loss in ((3, 1.0), (6, 2.0)):
        again.evaluated(step, {"loss": loss}, None)
    assert saved == [{"step": 3}] and len(published) == 1 and not again.due(3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("eval", 3), ("eval", 6)]


def test_files_are_told_where_they_are_in_the_end(tmp_path):
    watch = Watch(TrainConfig("m", "d", output="gs://bucket/run"), tmp_path, 0, lambda *_: tmp_path)
    assert watch.keep_bad({"tokens": np.ones(2)}) == "The batch is in gs://bucket/run/bad-batch.npz"
    assert (tmp_path / "bad-batch.npz").is_file()
