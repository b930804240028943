"""A model under scan as one with a layer after another: on a CPU it decodes faster.

A product on a CPU reads whole arrays, so a scan copies a layer's weights out of their stack before it uses them: once a
step of training that is little, once a token it is as much as the products take. What it costs: the weights are there
twice while both trees are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.leaves import as_array, is_implicit, unstacked

STACKS = ("layers", "h", "layer")
"""What the models call their layers."""


def unrolled(model: Any, params: Any) -> tuple[Any, Any]:
    """(model, params) of the same function, `layers` [l, ...] of the tree being `layers_0`, `layers_1`, ...

    Implicit leaves stay ones, and a model that reads a prefix still does. A model without a stack is given back as it
    is.
    """
    if (within := getattr(model, "model", None)) is not None:
        within, params = unrolled(within, params)
        return dataclasses.replace(model, model=within), params
    name = next((name for name in STACKS if name in params), None)
    if name is None or not getattr(model, "scan_layers", False):
        return model, params
    leaves, tree = jax.tree.flatten(params[name], is_leaf=is_implicit)
    split = [unstacked(leaf) or (as_array(leaf), lambda row: row) for leaf in leaves]
    count = jax.tree.leaves(split[0][0])[0].shape[0]
    rest = {key: value for key, value in params.items() if key != name}
    for n in range(count):
        rows = [rebuild(jax.tree.map(lambda x, n=n: x[n], rows)) for rows, rebuild in split]
        rest[f"{name}_{n}"] = jax.tree.unflatten(tree, rows)
    return dataclasses.replace(model, scan_layers=False), rest
