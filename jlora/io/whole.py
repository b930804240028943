"""Leaves from a file that may hold only some layers of a stack. The base is asked only for those left out: it may be
shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.leaves import as_array
from jlora.models.tensors import HFTensor


def stacked(held: Mapping[int | None, np.ndarray], count: int, rest: Callable[[], Any], dtype: Any) -> jax.Array:
    """What a file holds of a leaf, by layer: all of it where the key is None, else [count, ...], the layers that it
    leaves out from `rest()`, also [count, ...]."""
    if None in held:
        return jnp.asarray(held[None], dtype)
    layers = sorted(n for n in held if n is not None)
    values = jnp.asarray(np.stack([held[n] for n in layers]), dtype)
    return values if len(layers) == count else rest().astype(dtype).at[jnp.asarray(layers)].set(values)


def whole_of(w: Any, found: Sequence[tuple[HFTensor, np.ndarray]], dtype: Any) -> jax.Array:
    """A leaf trained whole: the file's values, the base's in layers the file leaves out."""
    held = {tensor.layer: array.T if tensor.transpose else array for tensor, array in found}
    return stacked(held, w.shape[0], lambda: weights_of(w, found[0][0].path), dtype)


def misfit(w: Any, tensor: HFTensor, array: np.ndarray) -> list[str]:
    """What does not fit of a file's tensor for a leaf trained whole, or one layer of it: a sentence, or none."""
    want = tuple(w.shape)[0 if tensor.layer is None else 1 :]
    want = want[::-1] if tensor.transpose else want
    return [] if array.shape == want else [f"{tensor.name} {list(array.shape)}, for a tensor {list(want)}"]


def weights_of(w: Any, path: str) -> jax.Array:
    """The base's own values. Raises ValueError where there are shapes only."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(w)):
        raise ValueError(f"{path}: the adapter leaves out some of its {w.shape[0]} layers, so the weights are needed")
    return as_array(w)
