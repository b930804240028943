"""How a `LoraLeaf` goes through `lax.ragged_dot`: rows sorted by expert, each times its expert's matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.leaves import RANK, LoraLeaf
from jlora.rules import drop_out, factors_by_use, rule


@rule("ragged_dot_general")
def ragged_dot(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    """x·W + scaling * (x·A)·B by the same groups, where both factors are stacks along the groups' axis."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_sum, w_sum), (batch, _) = numbers.dot_dimension_numbers
    # on a mesh whose axes are part of types the equation does not say where the middle features lie
    placed = eqn.params.get("out_sharding") is not None
    if position != 1 or len(operands) != 3 or batch or placed or not numbers.rhs_group_dimensions:
        return NotImplemented
    x, leaf, sizes = operands
    (group,), (ragged,) = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    w_free = [ax for ax in range(leaf.ndim) if ax != group and ax not in w_sum]
    if not fits(leaf, group, w_sum, w_free) or not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    (first, first_axes), (second, second_axes) = factors_by_use(leaf, w_sum)

    base = bind(x, leaf.w, sizes)

    x_free = [n for n in range(x.ndim) if n not in x_sum]
    precision = eqn.params["precision"]
    how = {"precision": precision, "preferred_element_type": eqn.params["preferred_element_type"]}
    with jax.named_scope("adapter"):
        by_sum = ragged_numbers(x_sum, [first_axes.index(ax) for ax in w_sum], ragged, first_axes.index(group))
        h = lax.ragged_dot_general(drop_out(leaf, x), first.astype(x.dtype), sizes, by_sum, precision=precision)
        second = jnp.transpose(second, [second_axes.index(ax) for ax in (group, RANK, *w_free)])
        by_rank = ragged_numbers([h.ndim - 1], [1], x_free.index(ragged), 0)
        delta = lax.ragged_dot_general(h, (second * leaf.scaling).astype(x.dtype), sizes, by_rank, **how)
        return base + delta.astype(base.dtype)


def fits(leaf: LoraLeaf, group: int, summed: Sequence[int], free: Sequence[int]) -> bool:
    """Whether one factor holds all that is summed, the other all that is not, and both the groups."""
    held = {frozenset(leaf.a_axes), frozenset(leaf.b_axes)}
    return held == {frozenset((group, RANK, *summed)), frozenset((group, RANK, *free))}


def ragged_numbers(x_sum: Sequence[int], w_sum: Sequence[int], ragged: int, group: int) -> Any:
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=((tuple(x_sum), tuple(w_sum)), ((), ())),
        lhs_ragged_dimensions=(ragged,),
        rhs_group_dimensions=(group,),
    )
