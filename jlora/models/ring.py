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

from jlora.models.attention import BLOCK, Sight, cut, fold, unfolded


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring(
    q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float, axis: str, block: int = BLOCK
) -> jax.Array:
    """In a `shard_map` over the mesh axis `axis`: q [b, s, h, k], keys, values [b, s, g, k] -> [b, s, h, k]; `sight`
    has this device's ids. Every device has s tokens, in the order of the axis."""
    return forward(q, keys, values, sight, scale, axis, block)[0]


def forward(
    q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float, axis: str, block: int
) -> tuple[jax.Array, Any]:
    """(the result, what `backward` needs)."""
    b, s, h, k = q.shape
    g, n = keys.shape[2], jax.lax.axis_size(axis)
    rows = (cut(q.reshape(b, s, g, h // g, k), block), cut(sight.q_ids + 1, block), starts(s, block))

    def visit(sums: Any, held: Any, away: Any) -> Any:
        """`sums` with what the device `away` places back has."""
        back = gap(away, s, axis)

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
        return (visit(sums, held, away), passed(held, axis)), None

    count = rows[-1].shape[0]
    shape = (count, b, g, h // g, block)
    first = (jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros((*shape, k)))
    held = (cut(keys, block), cut(values, block), cut(sight.k_ids + 1, block))
    (sums, held), _ = jax.lax.scan(step, (first, held), jnp.arange(n - 1))
    top, total, out = visit(sums, held, n - 1)
    out = unfolded(out / total[..., None], s).astype(q.dtype)
    return out, (q, keys, values, sight, out, top + jnp.log(total))


def backward(scale: float, axis: str, block: int, kept: Any, given: jax.Array) -> Any:
    """The gradients of q, keys and values from that of the result."""
    q, keys, values, sight, out, logs = kept
    b, s, h, k = q.shape
    g, n = keys.shape[2], jax.lax.axis_size(axis)
    split = lambda x: cut(x.reshape(b, s, g, h // g, k), block)
    # softmax's own share, Σ_j p_ij · dp_ij, is one number a query
    share = jnp.einsum("bshk,bshk->bsh", given.astype(jnp.float32), out.astype(jnp.float32))
    share = jnp.moveaxis(cut(share.reshape(b, s, g, h // g), block), 2, -1)
    rows = (split(q), split(given), cut(sight.q_ids + 1, block), starts(s, block), logs, share)

    def visit(d_q: Any, held: Any, grads: Any, away: Any) -> Any:
        back = gap(away, s, axis)

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
        return (d_q, passed(held, axis), passed(grads, axis)), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    held = (cut(keys, block), cut(values, block), cut(sight.k_ids + 1, block))
    first = (zeros(rows[0]), held, [zeros(x) for x in held[:2]])
    (d_q, held, grads), _ = jax.lax.scan(step, first, jnp.arange(n - 1))
    d_q, grads = visit(d_q, held, grads, n - 1)
    d_k, d_v = passed(grads, axis)  # home again
    whole = lambda x, like: jnp.moveaxis(x, 0, 1).reshape(b, -1, *like.shape[2:])[:, :s].astype(like.dtype)
    return whole(d_q, q), whole(d_k, keys), whole(d_v, values), None


ring.defvjp(forward, backward)


def passed(tree: Any, axis: str) -> Any:
    """What the device before sent; this one's goes to the next."""
    n = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]), tree)


def gap(away: Any, s: int, axis: str) -> jax.Array:
    """Tokens from the first of the device `away` places back round the ring to this one's first; negative: later."""
    me = jax.lax.axis_index(axis)
    return s * (me - (me - away) % jax.lax.axis_size(axis))


def starts(s: int, block: int) -> jax.Array:
    """i32 [c], the first token of each tile."""
    return jnp.arange(-(-s // block), dtype=jnp.int32) * block
