"""Attention over a mesh: heads over `tensor`, long rows over `sequence`.

Each device holds a part of every row. For attention the parts are exchanged for heads (all-to-all; Jacobs et al.,
arXiv 2309.14509), so that any kernel sees whole rows, and exchanged back. Where there are fewer heads than that needs,
keys and values go round instead (`models.ring`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jlora.models.attention import Attention, Sight, plain
from jlora.models.ring import ring


def over_mesh(inner: Attention | None, mesh: Mesh) -> Attention:
    """`inner` on each device's heads; None: the ring, whatever the heads. Where tokens do not divide, or heads by
    `tensor`: plain attention, split as XLA can."""
    n, tensor = mesh.shape["sequence"], mesh.shape["tensor"]

    def exchanged(
        q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, *, scale: float, inner: Attention
    ) -> jax.Array:
        if n == 1:
            return inner(q, keys, values, sight, scale)
        exchange = functools.partial(jax.lax.all_to_all, axis_name="sequence", tiled=True)
        q, keys, values = (exchange(x, split_axis=2, concat_axis=1) for x in (q, keys, values))
        ids = [jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (sight.q_ids, sight.k_ids)]
        out = inner(q, keys, values, dataclasses.replace(sight, q_ids=ids[0], k_ids=ids[1]), scale)
        return exchange(out, split_axis=1, concat_axis=2)

    def attention(q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float) -> jax.Array:
        h, g = q.shape[2], keys.shape[2]
        copies = {split: split // math.gcd(g, split) for split in (n * tensor, tensor)}  # a key head that several need
        fits = [split for split in copies if h % (g * copies[split]) == 0 and q.shape[1] % n == 0]
        if not fits:
            return plain(q, keys, values, sight, scale)
        split = fits[-1 if inner is None else 0]
        keys, values = (jnp.repeat(x, copies[split], axis=2) for x in (keys, values))
        if inner is None or split < n * tensor:
            return ring(q, keys, values, sight, scale, mesh)
        held, ids = PartitionSpec(None, "sequence", "tensor", None), PartitionSpec(None, "sequence")
        none: Any = PartitionSpec()
        specs = dataclasses.replace(
            sight, q_ids=ids, k_ids=ids, index=none, local=None if sight.local is None else none
        )
        run = jax.shard_map(
            functools.partial(exchanged, scale=scale, inner=inner),
            mesh=mesh,
            in_specs=(held, held, held, specs),
            out_specs=held,
            check_vma=False,
        )
        return run(q, keys, values, sight)

    return attention
