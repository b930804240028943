"""Settings that would not be used, or that lack another one, are refused."""

from __future__ import annotations

import pytest

from jlora.commands.settings import TrainConfig, check


@pytest.mark.parametrize("given", [{"eval_every": 5}, {"eval_every": 5, "patience": 2}, {"metrics": ("exact",)}])
def test_evaluations_need_rows(given):
    with pytest.raises(ValueError, match="needs rows to evaluate on: give eval_data or held_out"):
        check(TrainConfig("m", "d", **given))
    check(TrainConfig("m", "d", held_out=8, **given))
    check(TrainConfig("m", "d", eval_data="e", **given))


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "neftune"])
def test_preferences_have_no_terms_of_answers(loss, name):
    with pytest.raises(ValueError, match=f"{name} = 0.1: loss {loss} has no such term"):
        check(TrainConfig("m", "d", loss=loss, **{name: 0.1}))
    check(TrainConfig("m", "d", **{name: 0.1}))
