"""Bytes that a device receives in a step, by formula: weights, gradients and activations.

What an all-gather or an all-to-all leaves where it was is not counted; a sum over devices counts once, as its result.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

from jlora.io.load import layouts_of
from jlora.leaves import is_implicit
from jlora.models import family
from jlora.plan.estimate import shards, sizes_of, tokens_of
from jlora.plan.setting import PlanConfig, Setting, base_of
from jlora.sharding import BATCH, specs
from jlora.tree import nbytes, paths


def wires(plan: PlanConfig, run: Setting) -> dict[str, int]:
    """{gathered: weights, by FSDP (a layer's for each of its passes, others once); gradients: sums of the trained
    weights' over what splits rows and their tokens; activations: over `tensor` and `sequence`, of the layers}."""
    mesh, layers = run.mesh, sizes_of(run.config).layers
    tree, wanted = base_of(plan, run)
    found, gathered = paths(wanted), 0
    for path, leaf in paths(tree).items():
        whole, own = (nbytes(leaf) // shards(spec, mesh) for spec in (without(found[path], "fsdp"), found[path]))
        gathered += (whole - own) * ((2 + plan.again) if leaf.ndim == 3 and leaf.shape[0] == layers else 1)
    alone = math.prod(mesh.shape[name] for name in (*BATCH, "sequence")) == 1
    gradients = 0 if alone else nbytes(run.state.trained) // mesh.shape["tensor"]
    activations = summed(plan, run) + exchanged(plan, run)
    return {"gathered": gathered, "gradients": gradients, "activations": activations}


def without(spec: PartitionSpec, name: str) -> PartitionSpec:
    return PartitionSpec(*(None if entry == name else entry for entry in spec))


def summed(plan: PlanConfig, run: Setting) -> int:
    """Over `tensor`: what a matrix of split inputs puts out, and the gradient of what one of split outputs takes in.

    The layer's last sum is not taken again under rematerialisation: nothing of the backward pass needs it.
    """
    c, e = sizes_of(run.config), plan.itemsize
    tree, _ = base_of(plan, run)
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, plan.dtype), tree, is_leaf=is_implicit)
    found = specs(whole, layouts_of(family(run.config.model_type).hf_tensors(run.config)), run.mesh)
    split = [tuple(spec) for path, spec in paths(found).items() if path.endswith("/kernel") and len(spec) == 3]
    rows, columns = (sum(spec[axis] == "tensor" for spec in split) for axis in (1, 2))
    forward = rows * (1 + plan.again) - (plan.again if rows else 0)
    return (forward + columns) * c.layers * tokens_of(plan, run.mesh) * c.d * e


def exchanged(plan: PlanConfig, run: Setting) -> int:
    """Over `sequence`: q, keys, values and output for heads, each a device's share less what stays; or, where there are
    too few heads, keys and values once round the ring in each pass, and their gradients, in float32, home again."""
    c, e = sizes_of(run.config), plan.itemsize
    n, tensor = run.mesh.shape["sequence"], run.mesh.shape["tensor"]
    if n == 1:
        return 0
    one = c.layers * tokens_of(plan, run.mesh) * c.k  # of one head, all layers
    keys = math.lcm(c.groups, n * tensor)  # a key head that several devices need is copied
    if c.heads % keys == 0:
        return 2 * (c.heads + keys) // tensor * one * e * (2 + plan.again) * (n - 1) // n
    keys = math.lcm(c.groups, tensor)
    return 2 * keys // tensor * one * ((n - 1) * e * (2 + plan.again) + 4 * n)
