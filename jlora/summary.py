"""`summary(frozen, lora)`: a table of what is trained."""

from __future__ import annotations

import io
import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jlora.leaves import is_implicit
from jlora.lora import Together, is_adapter
from jlora.tree import flatten, nbytes, path_of, paths, size


def summary(frozen: Any, lora: Any) -> str:
    """One line a trained leaf (path, weight's shape, how it is adapted, elements trained) and the totals."""
    weights = {path: leaf for path, leaf in paths(frozen, is_implicit).items() if hasattr(leaf, "shape")}
    table = Table("parameter", "weight", "adapted", "trained", title=None)
    table.columns[3].justify = "right"
    trees = lora.trees if isinstance(lora, Together) else (lora,)
    for keys, entry in (found for tree in trees for found in flatten(tree, is_adapter)[0]):
        path = path_of(keys)
        shape = list(getattr(weights.get(path, entry), "shape", ()))  # a module's entry has none
        table.add_row(path, str(shape), how(entry), f"{size(entry):,}")
    table.add_section()
    trained, total = size(lora), sum(math.prod(w.shape) for w in weights.values()) + whole(lora)
    table.add_row(f"{trained:,} of {total:,} trained", "", "", f"{100 * trained / max(total, 1):.3f} %")
    table.add_row(f"{nbytes(lora) / 1e6:.1f} MB trained, {nbytes(frozen) / 1e6:.1f} MB frozen", "", "", "")
    out = io.StringIO()
    Console(file=out, width=120, no_color=True).print(table)
    return out.getvalue()


def how(entry: Any) -> str:
    return entry.describe() if is_adapter(entry) else "whole"


def whole(lora: Any) -> int:
    """Elements of the weights that are trained whole, which `frozen` does not hold."""
    return sum(0 if is_adapter(entry) else size(entry) for entry in jax.tree.leaves(lora, is_leaf=is_adapter))
