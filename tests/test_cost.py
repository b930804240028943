"""The compiled cost of fixed steps, against the committed baseline (`python -m tests.cost` writes it anew)."""

import json

import pytest

from tests.cost import BASELINE, STEPS, TOLERANCE, measured, version


@pytest.mark.parametrize("name", STEPS)
def test_a_step_costs_no_more_than_it_did(name):
    held = json.loads(BASELINE.read_text())
    if version() not in held:
        pytest.skip(f"no baseline for JAX {version()}: python -m tests.cost")
    now, before = measured(name), held[version()][name]
    worse = [
        f"{figure}: {now[figure]:,.0f}, was {before[figure]:,.0f}"
        for figure, more in TOLERANCE.items()
        if now[figure] > before[figure] * (1 + more)
    ]
    assert not worse, f"{'; '.join(worse)}. If that is meant: python -m tests.cost"
