"""The product of activations with a low-rank factor, whose gradients are products of a good shape too.

JAX takes dA = xᵀ·dh with whichever operand its rule puts first, and a compiler for CPUs then transposes the long one,
activations or their cotangent, and computes again in that order whatever was fused into it. Here the thin operand goes
first, so only [r, tokens] is transposed. A primitive and not a `custom_vjp`: forward mode, `vmap` and `remat` go on
working. To a policy that keeps products (`dots_saveable`) it is none, so what is cheap to compute again is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core as jex
from jax import lax
from jax.interpreters import ad, batching, mlir

from jlora.leaves import contract
from jlora.placing import on_explicit_mesh

Labels = tuple[int, ...]


def thin(x: Any, x_axes: Labels, factor: Any, axes: Labels, out_axes: Labels, **dot: Any) -> jax.Array:
    """`contract(x, x_axes, factor, axes, out_axes, **dot)`, of activations x and a factor."""
    labels = (x_axes, axes, out_axes)
    plain = all(sum(ax in held for held in labels) > 1 for ax in {ax for held in labels for ax in held})
    # inside shard_map, and on explicit meshes, it is for `dot_general` to mark what varies or lies over which axes
    if not plain or jax.sharding.get_abstract_mesh().manual_axes or on_explicit_mesh(x, factor):
        return contract(x, x_axes, factor, axes, out_axes, **dot)
    return thin_p.bind(x, factor, x_axes=x_axes, axes=axes, out_axes=out_axes, dot=tuple(sorted(dot.items())))


def run(x: Any, factor: Any, *, x_axes: Labels, axes: Labels, out_axes: Labels, dot: Any) -> jax.Array:
    return contract(x, x_axes, factor, axes, out_axes, **dict(dot))


def gradient_of_x(ct: Any, x: Any, factor: Any, *, x_axes: Labels, axes: Labels, out_axes: Labels, dot: Any) -> Any:
    out = thin(ct, out_axes, factor, axes, x_axes, **dict(dot))
    return out.astype(x.aval.dtype)


def gradient_of_factor(
    ct: Any, x: Any, factor: Any, *, x_axes: Labels, axes: Labels, out_axes: Labels, dot: Any
) -> Any:
    (first, first_axes), (second, second_axes) = sorted(
        ((x, x_axes), (ct, out_axes)), key=lambda operand: operand[0].size
    )
    stack = tuple(ax for ax in first_axes if ax in second_axes and ax in axes)
    natural = stack + tuple(ax for ax in (*first_axes, *second_axes) if ax in axes and ax not in stack)
    out = contract(first, first_axes, second, second_axes, natural, **dict(dot))
    if natural != axes:
        # not folded into the product, which would be the transposed one again
        out = lax.transpose(lax.optimization_barrier(out), [natural.index(ax) for ax in axes])
    return out.astype(factor.aval.dtype)


def batched(args: Any, dims: Any, *, x_axes: Labels, axes: Labels, out_axes: Labels, dot: Any) -> tuple[Any, int]:
    new = max(*x_axes, *axes, *out_axes) + 1

    def labelled(labels: Labels, at: Any) -> Labels:
        return labels if at is None else (*labels[:at], new, *labels[at:])

    (x, factor), (x_at, at) = args, dims
    return thin(x, labelled(x_axes, x_at), factor, labelled(axes, at), (new, *out_axes), **dict(dot)), 0


thin_p = jex.Primitive("thin_product")
thin_p.def_impl(jax.jit(run, static_argnames=("x_axes", "axes", "out_axes", "dot")))
thin_p.def_abstract_eval(lambda *avals, **params: jax.make_jaxpr(lambda *a: run(*a, **params))(*avals).out_avals[0])
ad.defbilinear(thin_p, gradient_of_x, gradient_of_factor)
batching.primitive_batchers[thin_p] = batched
mlir.register_lowering(thin_p, mlir.lower_fun(run, multiple_results=False))
