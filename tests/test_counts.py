"""Trainable parameters from configs alone: the paper's formulas exactly, its printed numbers, or a stated reason."""

import pytest

from experiments.counts import ROWS, SIZES, trained

EXACT = {
    ("RoBERTa-base", "LoRA r=8, q v"): 294_912,
    ("RoBERTa-large", "LoRA r=8, q v"): 786_432,
    ("DeBERTa-XXL", "LoRA r=16, q v"): 4_718_592,
    ("GPT-2 M", "LoRA r=4, q v"): 393_216,
    ("GPT-2 L", "LoRA r=4, q v"): 737_280,
    ("GPT-3 175B", "LoRA r=1, q v"): 4_718_592,
    ("GPT-3 175B", "LoRA r=8, q v"): 37_748_736,
    ("GPT-2 M", "full"): 354_823_168,
    ("GPT-2 L", "full"): 774_030_080,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model} {row.what}")
def test_row(row):
    count = trained(row.model, row.make)
    assert row.formula is None or count == row.formula(*SIZES[row.model])
    assert count == EXACT.get((row.model, row.what), count)
    digits = len(row.paper.partition(".")[2])
    off = abs(count / 1e6 - float(row.paper))
    assert off <= 0.5 * 10**-digits + 1e-9 or row.note
    assert off < 0.13 * float(row.paper)


def test_every_exact_count_is_a_row():
    assert set(EXACT) <= {(row.model, row.what) for row in ROWS}
