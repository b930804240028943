"""A batch in parts over the data and fsdp axes of a mesh, and a function run on each part on its own devices."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.leaves import is_implicit
from jlora.models.attention import Attention, attending, plain
from jlora.quant.leaf import QuantisedLeaf
from jlora.sequence import over_mesh
from jlora.sharding import BATCH, check_axes, weight_spec
from jlora.tree import path_of, paths

HEAD = re.compile(r"(^|/)lm_head/kernel$")
TABLE = re.compile(r"(^|/)(embed_tokens|wte)/embedding$")
"""What makes the logits where there is no head."""


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch's rows. Raises ValueError for a mesh without one of `AXES`."""
    check_axes(mesh)
    return math.prod(mesh.shape[name] for name in BATCH)


def split_batch(batch: Mapping[str, Any], mesh: Mesh, labels: int = 0) -> dict[str, Any]:
    """A batch of `data.collate` (or of packed rows) with a leading axis of `batch_shards(mesh)` parts: what is [b, s]
    becomes [n, b/n, s], what is one a label [n, l'], with `positions` and `example` counted within the part. A batch
    without positions has one entry a row: [b, ...] becomes [n, b/n, ...].

    A global position would send every hidden state to every device. labels: l' is at least this, and at least l/n,
    so that it seldom changes; a multiple of 8. Raises ValueError if the rows do not divide.
    """
    n = batch_shards(mesh)
    rows, length = batch["tokens"].shape
    if rows % n:
        raise ValueError(f"a batch of {rows} rows does not split into {n} ({dict(mesh.shape)}): use a multiple")
    if "positions" not in batch:
        return {name: np.reshape(array, (n, rows // n, *np.shape(array)[1:])) for name, array in batch.items()}
    span = rows // n * length
    owner, used = np.asarray(batch["positions"]) // span, np.asarray(batch["weights"]) != 0
    chosen = [np.flatnonzero(used & (owner == part)) for part in range(n)]
    least = max(labels, -(-len(used) // n), rows // n, *map(len, chosen))
    size = -(-least // 8) * 8  # a few shapes, so a few compilations
    out: dict[str, Any] = {}
    for name, array in batch.items():
        if array.ndim == 2:
            out[name] = np.reshape(array, (n, -1, length))
            continue
        out[name] = np.full((n, size), size if name == "example" else 0, array.dtype)
        for part, which in enumerate(chosen):
            mine = np.asarray(array)[which]
            if name == "positions":
                mine = mine - part * span
            elif name == "example" and "segments" in batch:
                mine = np.unique(mine, return_inverse=True)[1]
            elif name == "example":  # the row's number
                mine = mine - part * (rows // n)
            out[name][part, : len(which)] = mine
    return out


def own_rows(rows: int, mesh: Mesh) -> set[int]:
    """Which of a batch's `rows` rows lie on this process's devices."""
    n = batch_shards(mesh)
    parts = NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((n,))
    held = {part for (where,) in parts.values() for part in range(n)[where]}  # pyright: ignore[reportOptionalMemberAccess, reportGeneralTypeIssues]
    return {part * (rows // n) + row for part in held for row in range(rows // n)}


def batch_specs(batch: Any) -> Any:
    """Specs of a `split_batch`: parts over data and fsdp, the tokens of a row over sequence."""
    return {
        name: PartitionSpec(BATCH, None, "sequence") if len(array.shape) == 3 else PartitionSpec(BATCH)
        for name, array in batch.items()
    }


def over_batch(sums_fn: Callable[..., Any], mesh: Mesh, attention: Attention | None = plain) -> Callable[..., Any]:
    """`sums_fn(trained, frozen, batch, key)` for a `split_batch`, its sums added over the parts, as `over_parts` does
    them."""
    parts = over_parts(sums_fn, mesh, attention)
    return lambda *args: jax.tree.map(lambda x: jnp.sum(x, axis=0), parts(*args))


def over_parts(run: Callable[..., Any], mesh: Mesh, attention: Attention | None = plain) -> Callable[..., Any]:
    """`run(trained, frozen, batch, key)` for a `split_batch`, each part on its own devices: results [n, ...].

    Hidden states are held to their batch part (in Flax modules), so that weights are gathered and never activations;
    quantised ones are gathered as codes. With a key each part draws its own dropout. attention: what models attend
    with, as in `sequence.over_mesh`.
    """
    n = batch_shards(mesh)
    attention = over_mesh(attention, mesh)

    def sharded(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        trained, frozen = once((trained, frozen), mesh)
        frozen = jax.tree.map(lambda leaf: whole_in_use(leaf, mesh), frozen, is_leaf=is_implicit)

        def part(batch: Any, key: Any) -> Any:
            with constrained(mesh), attending(attention):
                return run(trained, frozen, batch, key)

        keys = None if key is None else jax.random.split(key, n)
        return jax.vmap(part, in_axes=(0, None if keys is None else 0), spmd_axis_name=BATCH)(batch, keys)

    return sharded


def whole_in_use(leaf: Any, mesh: Mesh) -> Any:
    """A quantised weight that is gathered over the batch's axes before a product writes it out."""
    if not isinstance(leaf, QuantisedLeaf):
        return leaf
    spec = weight_spec(leaf.path, leaf, None, mesh)
    return leaf.over(mesh, PartitionSpec(*(None if name in BATCH else name for name in spec)))


def once(trees: Any, mesh: Mesh) -> Any:
    """`trees` with the matrix of the logits (the head's, or the embedding of a model without one) gathered over fsdp
    before the loss, which would gather it for each chunk."""
    names = list(paths(trees))
    wanted = next((one for one in (HEAD, TABLE) if any(map(one.search, names))), None)
    if wanted is None or mesh.shape["fsdp"] == 1:
        return trees
    vocabulary = 1 if wanted is HEAD else 0

    def at(keys: Any, leaf: Any) -> Any:
        if getattr(leaf, "ndim", 0) != 2 or not wanted.search(path_of(keys)):
            return leaf
        over = "tensor" if leaf.shape[vocabulary] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(*(over if ax == vocabulary else None for ax in (0, 1)))
        own = weight_spec(path_of(keys), leaf, None, mesh)
        return gathered(leaf, NamedSharding(mesh, spec), NamedSharding(mesh, own))

    return jax.tree_util.tree_map_with_path(at, trees)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, whole: NamedSharding, own: NamedSharding) -> jax.Array:
    """x laid out as `whole`; its gradient as `own`, which a constraint alone would keep whole on every device."""
    return jax.lax.with_sharding_constraint(x, whole)


gathered.defvjp(
    lambda x, whole, own: (jax.lax.with_sharding_constraint(x, whole), None),
    lambda whole, own, _, given: (jax.lax.with_sharding_constraint(given, own),),
)


def constrained(mesh: Mesh) -> Any:
    """A context in which the outputs [b, s, d] of Flax modules other than `Dense` have s over sequence and d whole."""
    import flax.linen as nn

    def at(x: Any) -> Any:
        if not hasattr(x, "ndim") or x.ndim != 3 or x.shape[1] % mesh.shape["sequence"]:
            return x
        spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, "sequence", None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and not isinstance(context.module, nn.Dense):
            return jax.tree.map(at, out)
        return out

    return nn.intercept_methods(intercept)
