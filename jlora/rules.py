"""How a `LoraLeaf` goes through products, without building W + scaling * A·B: they are taken with w and with the
factors in turn, and added. Other primitives: `rules_structure`, `rules_scalar`, `rules_experts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.leaves import RANK, Labels, LoraLeaf, registering
from jlora.thin import thin

rule = registering(LoraLeaf.rules)


@rule("dot_general")
def dot_general(eqn: Any, bind: Callable[..., Any], position: int, lhs: Any, rhs: Any) -> Any:
    """x·W + scaling * (x·A)·B, for any contracted and batched axes on either side."""
    leaf, x = (lhs, rhs) if position == 0 else (rhs, lhs)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    w_sum, x_sum = (lhs_sum, rhs_sum) if position == 0 else (rhs_sum, lhs_sum)
    w_batch, x_batch = (lhs_batch, rhs_batch) if position == 0 else (rhs_batch, lhs_batch)

    base = bind(leaf.w, x) if position == 0 else bind(x, leaf.w)

    shared = dict(zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True))
    x_axes = tuple(shared.get(n, leaf.ndim + n) for n in range(x.ndim))
    x_free = tuple(ax for ax in x_axes if ax >= leaf.ndim)
    w_free = tuple(n for n in range(leaf.ndim) if n not in w_sum and n not in w_batch)
    out_axes = tuple(w_batch) + (w_free + x_free if position == 0 else x_free + w_free)

    (first, first_axes), (second, second_axes) = factors_by_use(leaf, w_sum)
    middle = tuple(ax for ax in x_axes if ax in out_axes or ax in second_axes)
    middle += tuple(ax for ax in first_axes if ax not in middle and (ax in out_axes or ax in second_axes))
    precision = eqn.params["precision"]
    how = {"precision": precision, "preferred_element_type": eqn.params["preferred_element_type"]}
    with jax.named_scope("adapter"):  # `profile` knows it by this name
        x = drop_out(leaf, x)
        h = thin(x, x_axes, first.astype(x.dtype), first_axes, middle, precision=precision)
        delta = thin(h, middle, (second * leaf.scaling).astype(x.dtype), second_axes, out_axes, **how)
        return base + delta.astype(base.dtype)


def factors_by_use(leaf: LoraLeaf, summed: Sequence[int]) -> tuple[tuple[Any, Labels], tuple[Any, Labels]]:
    """The factor to multiply first (it takes away the most summed elements), then the other, each with its axes."""
    a, b = (leaf.lora_a, leaf.a_axes), (leaf.lora_b, leaf.b_axes)

    def taken(factor: tuple[Any, Labels]) -> int:
        return math.prod(leaf.shape[ax] for ax in factor[1] if ax in summed)

    return (a, b) if taken(a) >= taken(b) else (b, a)


def drop_out(leaf: LoraLeaf, x: jax.Array) -> jax.Array:
    """x with dropout, for the adapter's path alone (as in the released package)."""
    if leaf.key is None or leaf.dropout == 0.0:
        return x
    key = leaf.key.ravel()[0] if leaf.key.ndim else leaf.key
    keep = jax.random.bernoulli(key, 1.0 - leaf.dropout, x.shape)
    return jnp.where(keep, x / (1.0 - leaf.dropout), jnp.zeros((), x.dtype))


@rule("conv_general_dilated")
def conv_general_dilated(eqn: Any, bind: Callable[..., Any], position: int, x: Any, leaf: Any) -> Any:
    """A convolution by the factor that holds the window, then a 1x1 product by the other.

    With groups the window factor is used once a group, so each group has its own r middle features.
    """
    params = eqn.params
    dims = params["dimension_numbers"]
    groups = params["feature_group_count"]
    out_ax, in_ax, *window = dims.rhs_spec
    if position != 1 or params["batch_group_count"] != 1:
        return NotImplemented
    if out_ax in leaf.b_axes and set(leaf.a_axes) == {in_ax, *window, RANK} and len(leaf.b_axes) == 2:
        (first, first_axes), (second, second_axes) = (leaf.lora_a, leaf.a_axes), (leaf.lora_b, leaf.b_axes)
    elif out_ax in leaf.a_axes and set(leaf.b_axes) == {in_ax, *window, RANK} and len(leaf.a_axes) == 2:
        (first, first_axes), (second, second_axes) = (leaf.lora_b, leaf.b_axes), (leaf.lora_a, leaf.a_axes)
    else:
        return NotImplemented

    base = bind(x, leaf.w)

    x = drop_out(leaf, x)
    order = tuple(first_axes.index(RANK if ax == out_ax else ax) for ax in range(leaf.ndim))
    kernel = jnp.transpose(first.astype(x.dtype), order)
    rank = kernel.shape[out_ax]
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out_ax)
    h = lax.conv_general_dilated(
        x,
        kernel,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dims,
        feature_group_count=groups,
        precision=params["precision"],
    )
    h = jnp.moveaxis(h, dims.out_spec[1], -1)
    h = h.reshape(*h.shape[:-1], groups, rank)
    second = (second * leaf.scaling).astype(x.dtype)
    second = jnp.transpose(second, (second_axes.index(RANK), second_axes.index(out_ax)))
    second = second.reshape(rank, groups, -1)
    delta = jnp.einsum("...gr,rgo->...go", h, second, precision=params["precision"])
    delta = jnp.moveaxis(delta.reshape(*delta.shape[:-2], -1), -1, dims.out_spec[1])
    return base + delta.astype(base.dtype)


@rule("gather")
def gather(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, indices: Any) -> Any:
    """Rows of W along one axis: rows of the factors that hold it. Rows of a stack stay factored."""
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    whole = all(size == leaf.shape[ax] for ax, size in enumerate(sizes) if ax not in dims.start_index_map)
    batching = tuple(getattr(dims, "operand_batching_dims", ()))
    if position != 0 or len(dims.start_index_map) != 1 or batching or not whole:
        return NotImplemented
    if tuple(dims.collapsed_slice_dims) != tuple(dims.start_index_map):
        return NotImplemented
    (axis,) = dims.start_index_map
    rest = [ax for ax in range(leaf.ndim) if ax != axis]
    out_ndim = indices.ndim - 1 + len(rest)
    batch_out = tuple(n for n in range(out_ndim) if n not in dims.offset_dims)
    renamed = dict(zip(rest, dims.offset_dims, strict=True))

    def rows(array: Any, axes: Labels) -> tuple[Any, Labels]:
        if axis not in axes:
            return array, tuple(renamed.get(ax, ax) for ax in axes)
        at = axes.index(axis)
        others = tuple(ax for ax in axes if ax != axis)
        sizes = tuple(1 if n == at else size for n, size in enumerate(array.shape))
        offsets = tuple(range(len(batch_out), len(batch_out) + len(others)))
        numbers = lax.GatherDimensionNumbers(offset_dims=offsets, collapsed_slice_dims=(at,), start_index_map=(at,))
        # past the end nothing is added to what W's own lookup fills in
        out = lax.gather(array, indices, numbers, sizes, mode=eqn.params["mode"], fill_value=0)
        return out, batch_out + tuple(renamed.get(ax, ax) for ax in others)

    out = leaf.with_parts(bind(leaf.w, indices), {name: rows(*held) for name, held in leaf.parts().items()})
    stacked = axis in leaf.a_axes and axis in leaf.b_axes
    return out if stacked else out.materialise()
