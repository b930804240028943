"""Attention over tokens that lie on several devices: queries stay, keys and values go round (Liu et al., 2310.01889).

Forward, keys and values make one round, backward one more with their gradients. Each device folds what it holds into
its softmax (`attention.fold`) and keeps of it the logarithm of its sum alone; scores are computed again, a tile at a
time (Dao et al., arXiv 2205.14135). A device keeps s / n tokens of everything, whatever n is.

Axes: n devices, b batch, s tokens of one device, h query heads, g key heads, r = h / g, k head size, c tiles of t
tokens (c · t >= s).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jlora.models.attention import BLOCK, Sight, cut, fold, starts, unfolded

AXIS = "sequence"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring(
    q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float, mesh: Mesh, block: int = BLOCK
) -> jax.Array:
    """q [b, n · s, h, k], keys, values [b, n · s, g, k] -> [b, n · s, h, k]: tokens over the mesh axis `sequence`,
    heads over `tensor`."""
    return forward(q, keys, values, sight, scale, mesh, block)[0]


def forward(
    q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float, mesh: Mesh, block: int
) -> tuple[jax.Array, Any]:
    """(the result, what `backward` needs)."""
    held, seen, logs = layouts(sight)
    there = functools.partial(forth, scale=scale, block=block)
    run = jax.shard_map(there, mesh=mesh, in_specs=(held, held, held, seen), out_specs=(held, logs), check_vma=False)
    # a scan over layers would take all masks, and constants of their size, out of the loop; not out of a checkpoint
    out, sums = jax.checkpoint(run)(q, keys, values, sight)
    return out, (q, keys, values, sight, out, sums)


def backward(scale: float, mesh: Mesh, block: int, kept: Any, given: jax.Array) -> Any:
    """The gradients of q, keys and values from that of the result."""
    held, seen, logs = layouts(kept[3])
    home = functools.partial(back, scale=scale, block=block)
    specs = (held, held, held, seen, held, logs, held)
    run = jax.shard_map(home, mesh=mesh, in_specs=specs, out_specs=(held, held, held), check_vma=False)
    return *jax.checkpoint(run)(*kept, given), None


ring.defvjp(forward, backward)


def layouts(sight: Sight) -> tuple[Any, Any, Any]:
    """Specs of queries (keys, values, the result), of `sight`, and of the logarithms by tile and head."""
    ids, none = PartitionSpec(None, AXIS), PartitionSpec()
    seen: Any = {"q_ids": ids, "k_ids": ids, "index": none, "local": None if sight.local is None else none}
    by_tile = PartitionSpec(AXIS, None, "tensor")
    return PartitionSpec(None, AXIS, "tensor"), dataclasses.replace(sight, **seen), by_tile


def forth(q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, *, scale: float, block: int) -> Any:
    """On one device: (the result [b, s, h, k], the logarithms of its sums f32 [c, b, g, r, t])."""
    b, s, h, k = q.shape
    g, n = keys.shape[2], jax.lax.axis_size(AXIS)
    rows = (cut(q.reshape(b, s, g, h // g, k), block), cut(sight.q_ids + 1, block), starts(s, block))

    def visit(sums: Any, held: Any, away: Any) -> Any:
        """`sums` with what the device `away` places back has."""
        back = gap(away, s)

        def row(of: Any) -> Any:
            (q, own, start), sums = of

            def column(sums: Any, part: Any) -> tuple[Any, None]:
                key, value, ids, column = part
                where = back + start - column

                def tile(sums: Any) -> Any:
                    seen = dataclasses.replace(sight, q_ids=own, k_ids=ids, index=where).dense()
                    return fold(sums, q, key, value, seen, scale)

                return jax.lax.cond(where <= -block, lambda sums: sums, tile, sums), None

            return jax.lax.scan(column, sums, (*held, starts(s, block)))[0]

        return jax.lax.map(row, (rows, sums))

    def step(state: Any, away: Any) -> tuple[Any, None]:
        sums, held = state
        return (visit(sums, held, away), passed(held)), None

    count = rows[-1].shape[0]
    shape = (count, b, g, h // g, block)
    first = (jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros((*shape, k)))
    held = (cut(keys, block), cut(values, block), cut(sight.k_ids + 1, block))
    (sums, held), _ = jax.lax.scan(step, (first, held), jnp.arange(n - 1))
    top, total, out = visit(sums, held, n - 1)
    return unfolded(out / total[..., None], s).astype(q.dtype), top + jnp.log(total)


def back(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    sight: Sight,
    out: Any,
    logs: Any,
    given: Any,
    *,
    scale: float,
    block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """On one device: the gradients of q, keys and values."""
    b, s, h, k = q.shape
    g, n = keys.shape[2], jax.lax.axis_size(AXIS)
    split = lambda x: cut(x.reshape(b, s, g, h // g, k), block)
    # softmax's own share, Σ_j p_ij · dp_ij, is one number a query
    share = jnp.einsum("bshk,bshk->bsh", given.astype(jnp.float32), out.astype(jnp.float32))
    share = jnp.moveaxis(cut(share.reshape(b, s, g, h // g), block), 2, -1)
    rows = (split(q), split(given), cut(sight.q_ids + 1, block), starts(s, block), logs, share)

    def visit(d_q: Any, held: Any, grads: Any, away: Any) -> Any:
        back = gap(away, s)

        def row(grads: Any, of: Any) -> Any:
            (q, given, own, start, logs, share), d_q = of

            def column(d_q: Any, part: Any) -> Any:
                key, value, ids, column, *grads = part
                where = back + start - column

                def tile(d_q: Any, d_k: Any, d_v: Any) -> Any:
                    seen = dataclasses.replace(sight, q_ids=own, k_ids=ids, index=where).dense()[:, None, None]
                    into = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
                    weights = jnp.where(seen, jnp.exp(into("bsgrk,btgk->bgrst", q, key) * scale - logs[..., None]), 0)
                    d_w = into("bsgrk,btgk->bgrst", given, value)
                    d_s = (weights * (d_w - share[..., None]) * scale).astype(q.dtype)
                    return (
                        d_q + into("bgrst,btgk->bsgrk", d_s, key),
                        d_k + into("bgrst,bsgrk->btgk", d_s, q),
                        d_v + into("bgrst,bsgrk->btgk", weights.astype(q.dtype), given),
                    )

                d_q, *grads = jax.lax.cond(where <= -block, lambda *x: x, tile, d_q, *grads)
                return d_q, grads

            d_q, grads = jax.lax.scan(column, d_q, (*held, starts(s, block), *grads))
            return grads, d_q

        grads, d_q = jax.lax.scan(row, grads, (rows, d_q))
        return d_q, grads

    def step(state: Any, away: Any) -> tuple[Any, None]:
        d_q, held, grads = state
        d_q, grads = visit(d_q, held, grads, away)
        return (d_q, passed(held), passed(grads)), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    held = (cut(keys, block), cut(values, block), cut(sight.k_ids + 1, block))
    first = (zeros(rows[0]), held, [zeros(x) for x in held[:2]])
    (d_q, held, grads), _ = jax.lax.scan(step, first, jnp.arange(n - 1))
    d_q, grads = visit(d_q, held, grads, n - 1)
    d_k, d_v = passed(grads)  # home again
    whole = lambda x, like: jnp.moveaxis(x, 0, 1).reshape(b, -1, *like.shape[2:])[:, :s].astype(like.dtype)
    return whole(d_q, q), whole(d_k, keys), whole(d_v, values)


def passed(tree: Any) -> Any:
    """What the device before sent; this one's goes to the next."""
    n = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)]), tree)


def gap(away: Any, s: int) -> jax.Array:
    """Tokens from the first of the device `away` places back round the ring to this one's first; negative: later."""
    me = jax.lax.axis_index(AXIS)
    return s * (me - (me - away) % jax.lax.axis_size(AXIS))
