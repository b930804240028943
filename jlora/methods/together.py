"""Several methods on one model: their trained trees side by side, attached one after another.

LoRA on the attention with adapters on the MLP, LoRA with BitFit, with a prefix (Hu et al., appendix E), two adapters on
one weight: each method meets what the one before it made of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jlora.lora import Together, is_adapter
from jlora.methods.plant import entries_of


def together(params: Any, *makes: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Together]:
    """(frozen, trained) of all `makes`, each a function of a tree of weights that gives (frozen, trained).

    `trained` goes where one method's would: `combine`, `merge`, `summary`, an optimiser. What a later method trains
    whole (a bias), an earlier one cannot use: BitFit comes before adapters. Raises ValueError where a weight that has
    an adapter trains whole afterwards, and what the makes raise.
    """
    trees, adapted = [], dict[str, Any]()
    for make in makes:
        params, trained = make(params)
        entries = entries_of(trained)
        for path in adapted.keys() & entries.keys():
            if not is_adapter(entries[path]):
                kind = type(adapted[path]).__name__
                raise ValueError(f"{path} trains whole, and has {kind} as well: leave it out of one of the methods")
        adapted |= {path: entry for path, entry in entries.items() if is_adapter(entry)}
        trees.append(trained)
    return params, Together(tuple(trees))


def flat(trained: Any) -> Any:
    """One tree in place of several that touch different weights, each by itself: the same function."""
    if not isinstance(trained, Together):
        return trained
    end = lambda x: x is None or is_adapter(x)
    columns = list(zip(*(jax.tree.leaves(tree, is_leaf=end) for tree in trained.trees), strict=False))
    alike = len({jax.tree.structure(tree, is_leaf=end) for tree in trained.trees}) == 1
    if not alike or any(sum(x is not None for x in column) > 1 for column in columns):
        return trained
    one = [next((x for x in column if x is not None), None) for column in columns]
    return jax.tree.unflatten(jax.tree.structure(trained.trees[0], is_leaf=end), one)
