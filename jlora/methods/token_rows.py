"""Trained rows of an embedding: new tokens without training, or saving, the whole table.

W' = W with some rows replaced. That is W + S·(rows - W[ids]) with S the one-hot columns of the ids: a LoRA weight whose
A is fixed, so that lookups and a tied head are handled as LoRA's are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.leaves import LoraLeaf, as_array
from jlora.lora import Adapter
from jlora.methods.plant import leaves_of, plant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowsLeaf(LoraLeaf):
    """A LoRA weight whose A, the one-hot columns of the ids, is fixed."""

    trainable: ClassVar[tuple[str, ...]] = ("lora_b",)
    called: ClassVar[dict[str, str]] = {"lora_b": "rows"}
    """Labels (`jlora.trainable_labels`) other than the array's name: these are no B, which LoRA+ trains faster."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows(Adapter):
    """`rows` [n, d]: what stands in rows `ids` of an embedding [v, d]."""

    rows: Any
    ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> RowsLeaf:
        """The dropout of LoRA's input does not apply: nothing is multiplied before the lookup."""
        index = jnp.asarray(self.ids)
        table = as_array(w)
        columns = jax.nn.one_hot(index, table.shape[0], axis=0, dtype=self.rows.dtype)
        return RowsLeaf(w, columns, self.rows - table[index].astype(self.rows.dtype), path=path)

    def describe(self) -> str:
        return f"{len(self.ids)} rows"


def make(params: Any, ids: Mapping[str, Sequence[int]], *, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """(frozen, trained): the rows `ids[path]` of the embedding [v, d] at each path, starting as they are.

    Raises ValueError for a path that is no embedding of the tree, or ids out of its range or given twice.
    """
    leaves, made = leaves_of(params), {}
    for path, chosen in ids.items():
        if path not in leaves or len(leaves[path].shape) != 2:
            raise ValueError(f"{path} is no embedding [v, d] of the tree; there are {', '.join(list(leaves)[:4])}, ...")
        size = leaves[path].shape[0]
        wrong = [n for n in chosen if not 0 <= n < size]
        if wrong or len(set(chosen)) != len(chosen) or not chosen:
            raise ValueError(f"token ids for {path} must differ and lie in 0..{size - 1}: {wrong or list(chosen)}")
        w = leaves[path]
        table = as_array(w)
        made[path] = (w, TokenRows(table[jnp.asarray(chosen)].astype(dtype), tuple(map(int, chosen))))
    return plant(params, made)
