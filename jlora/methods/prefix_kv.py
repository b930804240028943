"""Prefix tuning as in PEFT: keys and values of n columns train themselves, as a cache that is filled beforehand.

Li & Liang 2021 (2101.00190), without the network that makes them; 2 * L * e * n numbers, e the width of a layer's keys,
where `prefix.layer` trains the activations before the frozen projections (L * d * n, as Hu et al. count). Any decoder
with a cache takes it, GPT-2's fused projection and normed keys too: nothing of the model is in the way. Keys are as the
cache holds them, after the rotary positions 0 .. n - 1. Departure: they start near zero, not at N(0, 1): SmolLM2's
loss on reviews before any step is 6.9 alone, 5.9 after 8 columns of zeros, 16.8 after 8 of N(0, 1) (trained activations
of `prefix.layer` likewise: 5.9 and 20.1).
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.lora import Adapter, axes_of, leaf_key
from jlora.methods.plant import leaves_of
from jlora.methods.points import POINTS, layout_of

NAME = "prefix_kv"
"""What the columns are called beside the model's own parameters."""
FUSED = re.compile(r"(^|/)attn/c_attn/kernel$")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptColumns(Adapter):
    """`keys` and `values` [l, n, e]; it stands at the root, and goes last among several methods.

    The combined tree holds them under `NAME`, which `columns.Filled` takes out before the model sees its parameters.
    """

    keys: Any
    values: Any

    mergeable: ClassVar[bool] = False

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> Any:
        return {**w, NAME: {"keys": self.keys, "values": self.values}}

    def describe(self) -> str:
        return f"{self.keys.shape[1]} columns of keys and values in {self.keys.shape[0]} layers"


def make(
    params: Any, n: int, *, layouts: Any = None, size: float = 0.02, dtype: Any = jnp.float32, key: Any = None
) -> tuple[Any, KeptColumns]:
    """(frozen, trained): n columns of every attention, drawn from N(0, size²).

    Raises ValueError where no weight of keys is found (`points.POINTS`, or GPT-2's c_attn).
    """
    if n < 1:
        raise ValueError(f"{n} columns: at least 1 is needed")
    leaves, key = leaves_of(params), jax.random.key(0) if key is None else key
    found = [path for path in leaves if re.search(POINTS["key"], path) and path.endswith("kernel")]
    fused = [path for path in leaves if FUSED.search(path)]
    if not found and not fused:
        raise ValueError(f"no weight makes keys among {', '.join(list(leaves)[:4])}, ...")
    path = (found or fused)[0]
    w, layout = leaves[path], layout_of(path, leaves[path], layouts)
    wide = math.prod(w.shape[axis] for axis in axes_of(layout, "o"))
    layers = w.shape[0] if "s" in layout else len(found or fused)
    shape = (layers, n, wide if found else wide // 3)
    draw = lambda name: (size * jax.random.normal(leaf_key(key, name), shape)).astype(dtype)
    return params, KeptColumns(draw("keys"), draw("values"))
