"""Metrics on numbers worked out by hand, and intervals that cover."""

import math

import numpy as np
import pytest

from jlora.commands.measure import compared
from jlora.train.labels import label_figures
from jlora.train.metrics import label_metric, text_metric


def test_labels():
    pytest.importorskip("sklearn")
    got, want = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])  # tp 2, fp 1, fn 1, tn 1
    assert label_metric("accuracy", got, want) == pytest.approx(3 / 5)
    assert label_metric("f1", got, want) == pytest.approx(4 / 6)
    assert label_metric("matthews", got, want) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_f1_is_of_the_heads_classes_whichever_a_sample_holds():
    pytest.importorskip("sklearn")
    said, wanted = np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1])  # class 0: 2/3, class 1: 4/5
    for classes, want in ((2, 4 / 5), (3, (2 / 3 + 4 / 5) / 2)):
        assert label_figures(np.eye(classes)[said], wanted, False)["f1"] == pytest.approx(want)
    assert label_metric("f1", np.zeros(2, int), np.zeros(2, int), 2) == 0  # a draw without class 1


def test_numbers():
    pytest.importorskip("scipy")
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 16])
    assert label_metric("spearman", x, y) == pytest.approx(1)
    assert label_metric("pearson", x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    with pytest.raises(ValueError, match="metric 'mean' is not known"):
        label_metric("mean", x, y)


def test_texts():
    assert text_metric("exact")([" a", "b"], [["x", "a "], ["c"]]) == 0.5
    pytest.importorskip("sacrebleu")
    same = ["the cat sat on the mat today"]
    assert text_metric("bleu")(same, [["no", same[0]]]) == pytest.approx(100)
    assert text_metric("chrf")(["abc"], [["xyz"]]) == 0


@pytest.mark.filterwarnings("ignore")
def test_rouge():
    pytest.importorskip("rouge_score")
    # longest common subsequence 2 of 3 words on both sides
    assert text_metric("rouge")(["the cat sat"], [["the cat ran", "dog"]]) == pytest.approx(200 / 3)


def test_a_metric_of_the_user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def count(written, references):\n    return float(len(written))\n")
    assert text_metric(f"{path}:count")(["a", "b"], [["a"], ["b"]]) == 2
    with pytest.raises(ValueError, match="has no function other"):
        text_metric(f"{path}:other")
    with pytest.raises(ValueError, match=r"'blue' is not known: exact, bleu"):
        text_metric("blue")


def test_the_interval_of_a_mean_is_the_normal_one():
    x = np.random.default_rng(1).normal(3, 2, 400)
    low, high = compared({"x": lambda at: {"mean": x[at].mean()}}, len(x), 1000)["x"]["mean_interval"]
    half = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - half, abs=0.03) and high == pytest.approx(x.mean() + half, abs=0.03)
