"""What a task makes of rows and examples."""

import numpy as np
import pytest

from jlora.commands.settings import TrainConfig
from jlora.commands.tasks import Answers
from jlora.data import Example, Row, packing

EXAMPLES = [Example(np.arange(5, dtype=np.int32), np.arange(5) > 2)] * 40


@pytest.mark.parametrize(("settings", "steps"), [({"steps": 7}, 7), ({"epochs": 3.0}, 15), ({}, 5)])
def test_a_run_s_examples_are_packed_once(settings, steps, monkeypatch):
    packed, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *args: packed.append(args) or pack(*args))
    config = TrainConfig("m", "d", packing=True, batch=2, max_length=20, **settings)
    source = Answers(config).planned(EXAMPLES)
    assert len(source) == steps and len(packed) == 1
    np.testing.assert_array_equal(source[1]["tokens"], Answers(config).training(EXAMPLES, steps)[1]["tokens"])


def test_only_a_prompt_is_answered():
    rows = [Row(completion="text"), Row("ask", "answer"), Row(messages=({"role": "assistant", "content": "chat"},))]
    assert Answers(TrainConfig("m", "d")).asked(rows) == rows[1:2]
