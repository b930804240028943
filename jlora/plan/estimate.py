"""Bytes and FLOPs by formula: trees and their specs exactly, what a step holds besides by counting.

Letters: b rows and s tokens of one device, d model, f feed-forward, h heads, v vocabulary, l layers, e bytes an
element. Coefficients of the working set are those that the TPU compiler's figures bear out (docs/scale.md).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jlora.leaves import is_implicit
from jlora.models.attention import SHORT
from jlora.plan.known import Topology, topology
from jlora.plan.setting import PlanConfig, Setting
from jlora.sharding import BATCH
from jlora.tree import nbytes, paths, size

RESERVED = 0.02
"""Share of a chip's memory that programs do not get: the TPU compiler gives 15.75 of v5e's 16 GiB."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder's config, whatever its family calls them."""

    layers: int
    d: int
    f: int
    heads: int
    vocab: int
    gated: bool


def sizes_of(config: Any) -> Sizes:
    """From a config of any decoder family. Raises ValueError where a size is missing."""

    def first(*names: str) -> Any:
        found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        if found is None:
            raise ValueError(f"{type(config).__name__} has none of {', '.join(names)}: only decoders are planned")
        return found

    d = first("hidden_size", "n_embd")
    gpt = hasattr(config, "n_embd")
    inner = getattr(config, "n_inner", None) or 4 * d if gpt else first("intermediate_size")
    heads = first("num_attention_heads", "n_head")
    return Sizes(first("num_hidden_layers", "n_layer"), d, inner, heads, first("vocab_size"), not gpt)


def shards(spec: PartitionSpec, mesh: Any) -> int:
    names = [name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(mesh.shape[name] for name in names)


def held(tree: Any, specs: Any, mesh: Any) -> int:
    """Bytes of `tree` on one device."""
    wanted = paths(specs)
    return sum(nbytes(leaf) // shards(wanted[path], mesh) for path, leaf in paths(tree).items())


def working_set(plan: PlanConfig, run: Setting) -> dict[str, int]:
    """Bytes of activations and temporaries on one device, at the peak of the backward pass."""
    c, mesh = sizes_of(run.config), run.mesh
    tensor, e = mesh.shape["tensor"], jax.numpy.dtype(plan.dtype).itemsize
    b = plan.batch // math.prod(mesh.shape[name] for name in BATCH)
    s = plan.seq // mesh.shape["sequence"]
    tokens = b * s
    scores = b * c.heads * s * plan.seq // tensor
    inner = tokens * c.f // tensor
    layer = tokens * c.d
    # what the backward pass of one layer holds: scores in f32 and their weights, and the feed-forward's arrays
    plain = plan.attention == "plain" or (plan.attention == "auto" and plan.seq <= SHORT)
    scores *= plain
    block = scores * (4 + e) + inner * e * (4 if c.gated else 3) + layer * e * 8
    saved = c.layers * layer * e
    if plan.remat == "offload":
        saved = 2 * layer * e
    elif plan.remat != "full":
        kept = inner * (3 if c.gated else 2) + layer * 6 + (0 if plan.remat == "dots" else 3 * scores)
        saved += c.layers * kept * e
    logits = min(plan.chunk, tokens) * c.vocab // tensor * 4
    weights = matrices_of(run.frozen if plan.method != "full" else run.state.trained, c) // c.layers * e // tensor
    gathered = weights * (2 if mesh.shape["fsdp"] > 1 else 0)
    head = c.vocab * c.d * e // tensor if mesh.shape["fsdp"] > 1 else 0
    if plan.method == "merged":
        gathered += 3 * weights
    if plan.method == "full":
        gathered += weights
    return {"activations": saved, "temporaries": max(block + gathered, logits + layer * e + head)}


def estimate(plan: PlanConfig, run: Setting) -> dict[str, Any]:
    """{bytes a device by kind, their sum}: base, factors, optimiser, gradients, activations, temporaries."""
    mesh = run.mesh
    base = held(run.frozen, run.frozen_specs, mesh)
    trained = held(run.state.trained, run.state_specs.trained, mesh)
    kinds = {
        "base": base,
        "trained": trained,
        "optimiser": held(run.state.opt_state, run.state_specs.opt_state, mesh),
        "gradients": trained,
        **working_set(plan, run),
    }
    return {**kinds, "total": sum(kinds.values())}


def flops(plan: PlanConfig, run: Setting) -> float:
    """FLOPs of one step over all devices: 2 a multiplication and addition.

    A frozen matrix is multiplied forward and for its input's gradient, a trained one for its own gradient too, and
    once more forward under rematerialisation.
    """
    c = sizes_of(run.config)
    tokens = plan.batch * plan.seq
    again = 1 if plan.remat in ("full", "offload") else 0
    if plan.method == "full":
        matrices = matrices_of(run.state.trained, c)
        passes, extra = 3 + again, 0.0
    else:
        matrices = matrices_of(run.frozen, c)
        passes, extra = 2 + again, 2.0 * size(run.state.trained) * tokens * (3 + again)
    head = 2.0 * c.vocab * c.d * tokens * (passes + (1 - again))
    attention = 4.0 * plan.batch * c.layers * plan.seq**2 * c.d * (3 + again)
    return 2.0 * matrices * tokens * passes + extra + head + attention


def matrices_of(tree: Any, c: Sizes) -> int:
    """Elements of the layers' kernels, in floats or in codes."""
    leaves = jax.tree.leaves(tree, is_leaf=is_implicit)
    return sum(math.prod(leaf.shape) for leaf in leaves if len(leaf.shape) == 3 and leaf.shape[0] == c.layers)


def wires(plan: PlanConfig, run: Setting) -> dict[str, int]:
    """Bytes a device receives in a step: weights gathered by FSDP (forward and backward) and gradients summed."""
    mesh = run.mesh
    whole = held(run.frozen, jax.tree.map(lambda s: without(s, "fsdp"), run.frozen_specs), mesh)
    own = held(run.frozen, run.frozen_specs, mesh)
    trained = nbytes(run.state.trained) // mesh.shape["tensor"]
    if plan.method == "full":
        own = held(run.state.trained, run.state_specs.trained, mesh)
        whole = trained
    alone = math.prod(mesh.shape[name] for name in BATCH) == 1
    return {"gathered": 2 * (whole - own), "gradients": 0 if alone else trained}


def without(spec: PartitionSpec, name: str) -> PartitionSpec:
    return PartitionSpec(*(None if entry == name else entry for entry in spec))


def room(where: Topology) -> int:
    """Bytes of a device's memory that a program can have."""
    return int(where.chip.memory * (1 - RESERVED))


def largest(plan: PlanConfig, run: Setting, name: str) -> int:
    """The largest `batch` or `seq` (a multiple of what divides evenly, up to 2^20) that fits by formula; 0: none."""
    unit = math.prod(run.mesh.shape[axis] for axis in BATCH) if name == "batch" else 128
    limit = room(topology(plan.topology))

    def fits(n: int) -> bool:
        return estimate(dataclasses.replace(plan, **{name: n * unit}), run)["total"] <= limit

    low, high = 0, 2**20 // unit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * unit
