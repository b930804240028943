"""Bytes and FLOPs by formula: trees and their specs exactly, what a step holds besides by counting.

Letters: b rows and s tokens of one device, d model, f feed-forward, h heads, k head size, v vocabulary, l layers, e
bytes an element. What the working set counts is what lies in memory at the peak of programs that the TPU compiler
scheduled (docs/scale.md).
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jlora.generate import most_tokens
from jlora.leaves import is_implicit
from jlora.models.attention import SHORT
from jlora.models.gpt2 import GPT2Config
from jlora.plan.known import Topology, topology
from jlora.plan.setting import PlanConfig, Setting, base_of
from jlora.sharding import BATCH
from jlora.tree import nbytes, paths, size

RESERVED = 0.024
"""Share of a TPU's memory that programs do not get: the compiler gives 15.75 of v5e's 16 GiB, 31.25 of v6e's 32."""

GPU_SHARE = 0.75
"""Of a GPU's memory, what JAX takes for programs unless its environment says otherwise."""

LANES = 128
"""A TPU fills an array's last axis up to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder's config, whatever its family calls them."""

    layers: int
    d: int
    f: int
    heads: int
    groups: int
    k: int
    vocab: int
    gated: bool
    tied: bool


def sizes_of(config: Any) -> Sizes:
    """From a decoder's config of any family."""
    c = config
    if isinstance(c, GPT2Config):
        d, heads = c.n_embd, c.n_head
        return Sizes(c.n_layer, d, c.n_inner or 4 * d, heads, heads, d // heads, c.vocab_size, False, True)
    d, f, heads, groups = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads
    return Sizes(c.num_hidden_layers, d, f, heads, groups, c.head_dim, c.vocab_size, True, c.tie_word_embeddings)


def shards(spec: PartitionSpec, mesh: Any) -> int:
    names = [name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(mesh.shape[name] for name in names)


def held(tree: Any, specs: Any, mesh: Any) -> int:
    """Bytes of `tree` on one device."""
    wanted = paths(specs)
    return sum(nbytes(leaf) // shards(wanted[path], mesh) for path, leaf in paths(tree).items())


def tokens_of(plan: PlanConfig, mesh: Any) -> int:
    """Tokens of one device."""
    return plan.batch // math.prod(mesh.shape[name] for name in BATCH) * plan.seq // mesh.shape["sequence"]


class Activations(NamedTuple):
    """Bytes on one device of what a layer makes of its tokens: [tokens, d], [tokens, f] and [tokens, h · k]; and how
    many scores attention holds at once."""

    layer: int
    inner: int
    by_head: int
    scores: int


def activations(plan: PlanConfig, run: Setting) -> Activations:
    """Of one layer."""
    c, tensor, tokens = sizes_of(run.config), run.mesh.shape["tensor"], tokens_of(plan, run.mesh)
    plain = plan.attention == "plain" or (plan.attention == "auto" and plan.seq <= SHORT)
    one, heads = tokens * plan.itemsize, c.heads // min(tensor, c.heads)
    return Activations(
        layer=one * wide(plan, c.d),
        inner=one * wide(plan, c.f // tensor),
        by_head=one * heads * wide(plan, c.k),
        scores=tokens * c.heads * plan.seq // tensor if plain else 0,
    )


def wide(plan: PlanConfig, n: int) -> int:
    """Elements that an axis of n takes as an array's last."""
    return -(-n // LANES) * LANES if topology(plan.topology).compiler else n


def working_set(plan: PlanConfig, run: Setting) -> dict[str, int]:
    """Bytes of activations and temporaries on one device, at the peak: in the loss, or in the last layer's backward
    pass."""
    c, of = sizes_of(run.config), activations(plan, run)
    # gathered over fsdp: a matrix while the one before it is used; the head (with its part, turned) as soon as layers
    # run forward, kept until they have run backward; an embedding that is the head in both layouts, for the loss
    tensor, fsdp = run.mesh.shape["tensor"], run.mesh.shape["fsdp"]
    head = c.vocab * wide(plan, c.d) * plan.itemsize // tensor if fsdp > 1 else 0
    kept = 0 if c.tied else head + head // fsdp
    # logits as the product gives them, in float32, and their gradient
    logits = min(plan.chunk, tokens_of(plan, run.mesh)) * c.vocab // tensor * (4 + 2 * plan.itemsize)
    in_loss = logits + 2 * of.layer + (2 * head if c.tied else kept)
    in_layer = of.scores * (4 + plan.itemsize) + of.inner * (5 if c.gated else 3) + (of.layer + of.by_head) * 4
    in_layer += streamed(plan, run) + kept
    return {"activations": saved(plan, c, of), "temporaries": max(in_layer, in_loss)}


def saved(plan: PlanConfig, c: Sizes, of: Activations) -> int:
    """Bytes that the forward pass keeps for the backward one."""
    if plan.remat == "offload":
        return 2 * of.layer
    if plan.remat == "full":
        return c.layers * of.layer
    scores = 0 if plan.remat == "dots" else 3 * plan.itemsize * of.scores
    return c.layers * (of.inner * (3 if c.gated else 2) + of.layer * 7 + scores)


def streamed(plan: PlanConfig, run: Setting) -> int:
    """Bytes of the weights that are made, or come from other devices, while a layer runs."""
    weights, matrix = matrices_of(base_of(plan, run)[0], sizes_of(run.config))
    tensor, fsdp, e = run.mesh.shape["tensor"], run.mesh.shape["fsdp"], plan.itemsize
    if plan.method == "qlora":  # written out from codes: packed, a byte each three times over, and scales in float32
        return matrix * 15 // 2 // tensor
    stream = matrix * e // tensor * (2 if fsdp > 1 else 1)
    if plan.method == "full":
        stream += matrix * e // tensor  # its gradient
    if plan.method == "merged":
        stream += 3 * weights * e // (tensor * fsdp)  # A·B, W + A·B and its gradient, all layers at once
    return stream


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
    if plan.method != "full":  # the factors in the dtype of the computation
        kinds["temporaries"] += trained * plan.itemsize // 4
    return {**kinds, "total": sum(kinds.values())}


def flops(plan: PlanConfig, run: Setting) -> float:
    """FLOPs of one step over all devices: 2 a multiplication and addition.

    A frozen matrix is multiplied forward and for its input's gradient, a trained one for its own gradient too, and
    once more forward under rematerialisation.
    """
    c = sizes_of(run.config)
    tokens = plan.batch * plan.seq
    matrices, _ = matrices_of(base_of(plan, run)[0], c)
    passes, extra = 3 + plan.again, 0.0
    if plan.method != "full":
        passes, extra = 2 + plan.again, 2.0 * size(run.state.trained) * tokens * (3 + plan.again)
    head = 2.0 * c.vocab * c.d * tokens * (passes + (1 - plan.again))
    attention = 4.0 * plan.batch * c.layers * plan.seq**2 * c.heads * c.k * (3 + plan.again)
    return 2.0 * matrices * tokens * passes + extra + head + attention


def matrices_of(tree: Any, c: Sizes) -> tuple[int, int]:
    """(elements of the layers' kernels, of the largest in one layer), in floats or in codes."""
    leaves = jax.tree.leaves(tree, is_leaf=is_implicit)
    sizes = [math.prod(leaf.shape) for leaf in leaves if len(leaf.shape) == 3 and leaf.shape[0] == c.layers]
    return sum(sizes), max(sizes) // c.layers


def room(where: Topology) -> int:
    """Bytes of a device's memory that a program can have."""
    if where.compiler:
        return int(where.memory * (1 - RESERVED))
    told = [os.environ.get(name) for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")]
    return int(where.memory * float(told[0] or told[1] or GPU_SHARE))


def largest(plan: PlanConfig, run: Setting, name: str) -> int:
    """The largest `batch` or `seq` (a multiple of what divides evenly, up to 2^20 and a model's positions) that fits by
    formula; 0: none."""
    shape, most = run.mesh.shape, 2**20
    unit = math.prod(shape[axis] for axis in BATCH)
    if name == "seq":
        unit, most = math.lcm(128, shape["sequence"]), min(most, most_tokens(run.model) or most)
    limit = room(topology(plan.topology))

    def fits(n: int) -> bool:
        return estimate(dataclasses.replace(plan, **{name: n * unit}), run)["total"] <= limit

    def search(low: int, high: int) -> int:
        """The largest n in low + 1 .. high that fits, or `low`; what fits there must be all up to some n."""
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    # short rows may hold all scores, and need more then than longer ones that do not
    short = min(SHORT, most) // unit if name == "seq" else 0
    found = search(short, most // unit)
    return (found if found > short else search(0, short)) * unit
