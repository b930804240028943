"""Several processes read a share of the rows each: what they tell one another is what was read."""

import numpy as np
import pytest

from jlora.commands import share
from jlora.data import Example, Labelled

ARRAYS = [np.array(x, np.int32) for x in ([5], [7, 8], [9])]
EXAMPLES = [Example(x, x > 7) for x in ARRAYS]
LABELLED = [Labelled(x, x > 9, x * 0, 0.5 * n) for n, x in enumerate(ARRAYS)]


def same(a, b):
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    values = [(getattr(a, name), getattr(b, name)) for name in share.names_of(type(a))]
    return type(a) is type(b) and all(
        type(x) is type(y) and np.array_equal(x, y) and getattr(x, "dtype", 0) == getattr(y, "dtype", 0)
        for x, y in values
    )


@pytest.mark.parametrize(
    "examples", [EXAMPLES, LABELLED, LABELLED[:1], [(EXAMPLES[0], EXAMPLES[1]), (EXAMPLES[2], EXAMPLES[0])]]
)
def test_what_is_told_is_what_was_read(examples):
    found, cut = share.from_bytes(share.to_bytes(examples, 2))
    assert same(found, examples) and cut == 2
