"""`profile`: the step's instructions told apart by what they do, the clock and the bytes."""

import re

import jax
import jax.numpy as jnp
import pytest

from jlora.profile import KINDS, kinds_of, profile
from jlora.tree import nbytes
from tests.cost import CONFIG, step_of


@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_the_products_with_frozen_weights_are_told_apart(scheme):
    step, args = step_of("all-linear", scheme)
    kinds = kinds_of(step.lower(*args).compile().as_text(), args[1])
    assert "matmul" in {kind for kind, _ in kinds.values()}
    for kind, scope in kinds.values():
        products = re.search(r"(q|k|v|o|gate|up|down)_proj/dot_general", scope)
        assert (kind == "matmul") == bool(products), scope
        assert ("embed_tokens.attend" in scope) <= (kind == "loss"), scope


def test_a_step_is_run_and_clocked():
    step, args = step_of("all-linear")
    state, frozen, batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), args)
    found = profile(step, state, frozen, batch, repeats=2)
    assert set(found.by_kind) == set(KINDS) and all(seconds > 0 for seconds in found.by_kind.values())
    assert 0 < sum(found.by_kind.values()) < 2 * jax.device_count() * max(found.seconds, 1)
    assert found.bytes["frozen weights"] == nbytes(frozen) and found.bytes["trained"] == nbytes(state.trained)
    assert found.bytes["temporaries"] > 3 * CONFIG.intermediate_size * 120 * 4
    assert len(found.longest) == 10 and "a step:" in str(found)
