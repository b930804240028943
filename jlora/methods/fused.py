"""LoRA on some parts of a fused weight: query and value of GPT-2's c_attn, as the paper adapts them.

x·W with W = [W_1 .. W_p] side by side gets scaling * (x·A_k)·B_k in each chosen part k and nothing in the others: what
loralib's MergedLinear does with `enable_lora`. It is one LoRA weight of rank n r whose B is zero off its blocks; the
blocks alone train, 2 d r numbers a part for a part [d, d].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.inits import kaiming
from jlora.leaves import LoraLeaf
from jlora.lora import Adapter, LoraFactors, axes_of, leaf_key
from jlora.methods.plant import leaves_of, plant
from jlora.methods.points import find, layout_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedFactors(Adapter):
    """`lora_a` [s, i, n, r] and `lora_b` [s, n, r, o / p] of n of a weight's p parts; `enable` says which."""

    lora_a: Any
    lora_b: Any
    scaling: float = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})
    enable: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    def settled(self) -> LoraFactors:
        """The same difference as plain factors of rank n r, for what knows only these: files, mixing, merging."""
        parts = [k for k, on in enumerate(self.enable) if on]
        place = jax.nn.one_hot(jnp.asarray(parts), len(self.enable), dtype=self.lora_b.dtype)
        b = jnp.einsum("...nrw,np->...nrpw", self.lora_b, place)
        rank = len(parts) * self.lora_a.shape[-1]
        b = b.reshape(*b.shape[:-4], rank, -1)
        return LoraFactors(self.lora_a.reshape(*self.lora_a.shape[:-2], rank), b, self.scaling, self.layout)

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> LoraLeaf:
        return self.settled().attach(w, path, dropout, key)

    def describe(self) -> str:
        which = "".join("x" if on else "-" for on in self.enable)
        return f"rank {self.lora_a.shape[-1]}, scaling {self.scaling:g}, parts {which}"


def make(
    params: Any,
    rank: int,
    *,
    parts: Mapping[str, Sequence[bool]],
    alpha: float | None = None,
    layouts: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    key: Any = None,
) -> tuple[Any, Any]:
    """(frozen, trained): factors of `rank` for each part that is True, {"c_attn": (True, False, True)}.

    parts: by name or regex of the weight, one bool for each of the equal parts of its outputs, in order.
    alpha: the scaling is alpha / rank (1 if not given). key: PRNG key of A, uniform in ±1/sqrt(i); B starts at zero.
    Raises ValueError for a name that matches no matrix, outputs that do not divide, or no part chosen.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: it must be 1 or more")
    leaves, key = leaves_of(params), jax.random.key(0) if key is None else key
    scaling, made = (1.0 if alpha is None else alpha / rank), {}
    for name, chosen in parts.items():
        enable = tuple(map(bool, chosen))
        for path in find(name, leaves, layouts, "parts"):
            w = leaves[path]
            layout = layout_of(path, w, layouts)
            stack, inputs, outputs = (tuple(w.shape[ax] for ax in axes_of(layout, letter)) for letter in "sio")
            if not any(enable) or len(outputs) != 1 or outputs[0] % len(enable):
                raise ValueError(f"{path} {list(w.shape)} does not divide into the parts {enable}, or none is True")
            n, rows = sum(enable), math.prod(inputs)
            matrix = jax.ShapeDtypeStruct((rows, outputs[0]), w.dtype)  # only the shape is read
            keys = jax.random.split(leaf_key(key, path), math.prod(stack))
            a = jax.vmap(lambda k, m=matrix, r=n * rank: kaiming(k, m, r, scaling)[0])(keys)
            b = jnp.zeros((*stack, n, rank, outputs[0] // len(enable)), dtype)
            a = a.reshape(*stack, *inputs, n, rank).astype(dtype)
            made[path] = (w, FusedFactors(a, b, scaling, layout, enable))
    return plant(params, made)


def settle(trained: Any) -> Any:
    """`trained` with plain factors in place of fused ones: the same function."""
    is_fused = lambda x: isinstance(x, FusedFactors)
    return jax.tree.map(lambda x: x.settled() if is_fused(x) else x, trained, is_leaf=is_fused)
