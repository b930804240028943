"""Several methods on one model: their trained trees side by side, attached one after another.

LoRA on the attention with adapters on the MLP, LoRA with BitFit, with a prefix (Hu et al., appendix E), two adapters on
one weight: each method meets what the one before it made of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jlora.lora import Together


def together(params: Any, *makes: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Together]:
    """(frozen, trained) of all `makes`, each a function of a tree of weights that gives (frozen, trained).

    `trained` goes where one method's would: `combine`, `merge`, `summary`, an optimiser. What a later method trains
    whole (a bias), an earlier one cannot use: BitFit comes before adapters.
    """
    trees = []
    for make in makes:
        params, trained = make(params)
        trees.append(trained)
    return params, Together(tuple(trees))
