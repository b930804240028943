"""Full fine-tuning, and of the top layers only.

Full: every weight trains. FT-top2 of Hu et al. (2021, table 3) trains the last k layers (Li & Liang 2021).
Departure: in a scanned model the layers are rows of stacked leaves; the last k rows train, and the rows below keep
their values, but the gradient of the whole stack is computed before its lower rows are dropped. With
`scan_layers=False` it is not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.leaves import is_implicit
from jlora.lora import Adapter, only_plain
from jlora.methods.plant import floats_of, plant, whole
from jlora.tree import LAYER, STACK, Targets, select, slashed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopRows(Adapter):
    """The last rows [k, ...] of a stacked weight [s, ...]."""

    rows: Any

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> Any:
        if is_implicit(w):
            raise ValueError(f"{path}: its last rows train whole: make `top` first, the {type(w).__name__} after")
        return jnp.concatenate([w[: w.shape[0] - self.rows.shape[0]], self.rows.astype(w.dtype)])

    def describe(self) -> str:
        return f"the last {self.rows.shape[0]} rows"


def make(params: Any, *, train: Targets = lambda path, leaf: True, key: Any = None) -> tuple[Any, Any]:
    """(frozen, trained): every leaf of floats that `train` means trains whole (all of them if it is not given)."""
    return whole(params, select(train, floats_of(params), "train"))


def top(params: Any, layers: int, *, also: Targets = (), key: Any = None) -> tuple[Any, Any]:
    """(frozen, trained): the last `layers` layers train, and the leaves that `also` means (a head, the last norm).

    Layers are read from paths: `layers_3/...`, `h/3/...`, or rows of the leaves under `layers/...`.
    Raises ValueError where there are none, or fewer than asked for, or for a leaf that is quantised.
    """
    leaves = floats_of(params)
    extra = select(also, leaves, "also") if callable(also) or list(also) else []
    made = {path: (None, leaves[path]) for path in extra}
    numbers = {path: int(found[1]) for path in leaves if (found := LAYER.search(slashed(path)))}
    stacked = [path for path in leaves if STACK.search(slashed(path)) and path not in numbers]
    count = max(numbers.values()) + 1 if numbers else leaves[stacked[0]].shape[0] if stacked else 0
    if not 1 <= layers <= count:
        raise ValueError(f"top {layers} layers: the tree has {count}; paths look like {next(iter(leaves), 'none')}")
    upper = [path for path, n in numbers.items() if n >= count - layers] if numbers else stacked
    only_plain(leaves, [*extra, *upper])
    if numbers:
        made |= {path: (None, leaves[path]) for path in upper}
    else:
        made |= {path: (leaves[path], TopRows(leaves[path][count - layers :])) for path in upper}
    return plant(params, made)
