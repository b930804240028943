"""Causal attention, plain or in blocks: what the models call, and which way it is done.

A model says who may see whom (`Sight`) and calls `attend`; a context (`attending`) chooses the way: "plain" holds all
scores, "blockwise" a block of them at a time (Rabe and Staats 2021; Dao et al. 2022), "splash" is JAX's kernel for TPU
and "cudnn" NVIDIA's for GPU. All give the same numbers but for rounding.

Axes: b batch, s sequence, t keys (the cache's length, or s), h query heads, g key heads, k head size.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 512
"""Queries, and keys, of a block."""
SHORT = 512
"""Tokens of a row up to which plain attention is best."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """Query i sees key j if j is no later, both have one id, and j is within the window.

    `q_ids` i32 [b, s], `k_ids` i32 [b, t]: the example, for packed rows; padding has ids that no other has.
    `index` i32 []: the column of the first query. `window`: how many keys back are seen, None for all.
    `local` bool []: whether the window holds, where only some layers have it. `packed`: rows may hold several examples.
    """

    q_ids: Any
    k_ids: Any
    index: Any = 0
    local: Any = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense(self) -> jax.Array:
        """bool [b, s, t]."""
        rows = self.index + jnp.arange(self.q_ids.shape[1])[:, None]
        columns = jnp.arange(self.k_ids.shape[1])
        seen = columns <= rows
        if self.window is not None:
            near = columns > rows - self.window
            seen &= near if self.local is None else near | ~jnp.asarray(self.local)
        return seen & (self.q_ids[:, :, None] == self.k_ids[:, None])

    def within(self, window: int, local: Any = None) -> Sight:
        """The same with a window."""
        return dataclasses.replace(self, window=window, local=local)


Attention = Callable[[jax.Array, jax.Array, jax.Array, Sight, float], jax.Array]
"""f(q [b, s, h, k], keys [b, t, g, k], values [b, t, g, k], sight, scale) -> [b, s, h, k]."""

way: contextvars.ContextVar[Attention | None] = contextvars.ContextVar("attention", default=None)


@contextlib.contextmanager
def attending(attention: Attention | None) -> Iterator[None]:
    """Models traced inside attend by `attention` where there are as many queries as keys: not by a step on a cache."""
    token = way.set(attention)
    try:
        yield
    finally:
        way.reset(token)


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float | None = None) -> jax.Array:
    """Softmax attention, scores in float32: q [b, s, h, k], keys and values [b, t, g, k] -> [b, s, h, k].

    h / g query heads share a key head. scale: 1 / sqrt(k) if not given.
    """
    by = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = way.get() if q.shape[1] == keys.shape[1] else None
    return (chosen or plain)(q, keys.astype(q.dtype), values.astype(q.dtype), sight, by)


def plain(q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float) -> jax.Array:
    """All scores [b, h, s, t] at once."""
    groups = q.reshape(*q.shape[:2], keys.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("bsgrk,btgk->bgrst", groups, keys).astype(jnp.float32)
    scores = jnp.where(sight.dense()[:, None, None], scores * scale, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bgrst,btgk->bsgrk", weights, values).reshape(q.shape)


def blockwise(
    q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float, block: int = BLOCK
) -> jax.Array:
    """A [block, block] tile of scores at a time, computed again in the backward pass: memory linear in s."""
    b, s, h, k = q.shape
    g = keys.shape[2]
    q_parts, k_parts, v_parts = (cut(x, block) for x in (q.reshape(b, s, g, h // g, k), keys, values))
    # what is padded here has id 0: seen by none
    q_ids, k_ids = cut(sight.q_ids + 1, block), cut(sight.k_ids + 1, block)
    first_of = starts(s, block)

    def tile(carry: Any, query: Any, part: Any) -> Any:
        (q, own, row), (key, value, ids, column) = query, part
        seen = dataclasses.replace(sight, q_ids=own, k_ids=ids, index=row - column).dense()
        return fold(carry, q, key, value, seen, scale)

    @jax.checkpoint
    def column(carry: Any, part: Any, query: Any) -> tuple[Any, None]:
        later = part[-1] >= query[-1] + block  # every key of the tile comes after every query
        return jax.lax.cond(later, lambda carry, *_: carry, tile, carry, query, part), None

    @jax.checkpoint
    def row(query: Any) -> jax.Array:
        shape = (b, g, h // g, block)
        first = (jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros((*shape, k)))
        parts = (k_parts, v_parts, k_ids, first_of)
        (_, total, out), _ = jax.lax.scan(functools.partial(column, query=query), first, parts)
        return (out / total[..., None]).astype(q.dtype)

    return unfolded(jax.lax.map(row, (q_parts, q_ids, first_of)), s)


def cut(x: jax.Array, block: int) -> jax.Array:
    """[b, s, ...] -> [s / block rounded up, b, block, ...], filled up with 0."""
    b, s, *rest = x.shape
    count = -(-s // block)
    x = jnp.pad(x, ((0, 0), (0, count * block - s), *((0, 0),) * len(rest)))
    return jnp.moveaxis(x.reshape(b, count, block, *rest), 1, 0)


def starts(s: int, block: int) -> jax.Array:
    """i32 [s / block rounded up], the first token of each block."""
    return jnp.arange(-(-s // block), dtype=jnp.int32) * block


def unfolded(out: jax.Array, s: int) -> jax.Array:
    """Results by block and head [n, b, g, r, block, k] -> [b, s, h, k]."""
    n, b, g, r, block, k = out.shape
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(b, n * block, g * r, k)[:, :s]


def fold(
    sums: tuple[jax.Array, jax.Array, jax.Array], q: Any, keys: Any, values: Any, seen: Any, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax as it goes: sums (the largest score, Σ exp, Σ exp · value; f32 [b, g, r, s] and [..., k]) with the
    scores of q [b, s, g, r, k] and keys [b, t, g, k], where seen [b, s, t]."""
    top, total, out = sums
    scores = jnp.einsum("bsgrk,btgk->bgrst", q, keys).astype(jnp.float32) * scale
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    new = jnp.maximum(top, scores.max(-1))
    weights, decay = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
    out = out * decay[..., None] + jnp.einsum("bgrst,btgk->bgrsk", weights.astype(q.dtype), values)
    return new, total * decay + weights.sum(-1), out


def splash(
    q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas kernel for TPU. Where it does not fit (s no multiple of 128, a window of some layers): blockwise."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    s, h = q.shape[1:3]
    if s % 128 or sight.local is not None:
        return blockwise(q, keys, values, sight, scale)
    one = masks.CausalMask((s, s)) if sight.window is None else masks.LocalMask((s, s), (sight.window - 1, 0), 0)
    size = next(n for n in (512, 256, 128) if s % n == 0)
    sizes = kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * h), head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
    )
    turn = lambda x: jnp.swapaxes(x, 1, 2)
    out = jax.vmap(run)(turn(q * scale), turn(keys), turn(values), kernel.SegmentIds(sight.q_ids, sight.k_ids))
    return turn(out).astype(q.dtype)


def cudnn(
    q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float, implementation: Any = "cudnn"
) -> jax.Array:
    """NVIDIA's fused kernel, for bfloat16 and float16. Where it would need a bias [b, 1, s, s] (packed rows, a window
    of some layers): blockwise. A row with padding elsewhere than after its tokens comes out as NaN."""
    if sight.packed or sight.local is not None:
        return blockwise(q, keys, values, sight, scale)
    s, window = q.shape[1], sight.window
    real = sight.q_ids == sight.k_ids
    length = jnp.sum(real, axis=1, dtype=jnp.int32)
    fits = jnp.all(real == (jnp.arange(s) < length[:, None]), axis=1)
    fits &= jnp.all((sight.q_ids == sight.q_ids[:, :1]) | ~real, axis=1)
    length = jnp.maximum(length, 1)  # a row of padding alone: a softmax over nothing is not finite
    out = jax.nn.dot_product_attention(
        q,
        keys,
        values,
        scale=scale,
        is_causal=True,
        query_seq_lengths=length,
        key_value_seq_lengths=length,
        local_window_size=None if window is None or window >= s else (window - 1, 0),
        implementation=implementation,
    )
    return jnp.where(fits[:, None, None, None], out, jnp.nan).astype(q.dtype)


def by_cudnn(q: jax.Array) -> bool:
    """Whether the GPU's kernel takes q [b, s, h, k], by its type and head size (JAX's own limits)."""
    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]  # of AMD's "gfx942"
    largest = 0 if not major.isdigit() or int(major) < 8 else 128 if int(major) < 9 else 256
    return q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= largest


def fitting(platform: str, short: int = SHORT) -> Attention:
    """The best way on "tpu" or "gpu", or on "any": plain for rows of at most `short` tokens. Kernels that are no XLA
    must be told how their arrays are sharded, so "any" has none."""

    def attention(q: jax.Array, keys: jax.Array, values: jax.Array, sight: Sight, scale: float) -> jax.Array:
        if q.shape[1] <= short:
            return plain(q, keys, values, sight, scale)
        kernel = splash if platform == "tpu" else cudnn if platform == "gpu" and by_cudnn(q) else blockwise
        return kernel(q, keys, values, sight, scale)

    return attention


WAYS: dict[str, Attention] = {"plain": plain, "blockwise": blockwise, "splash": splash, "cudnn": cudnn}


def named(name: str, platform: str) -> Attention:
    """One of `WAYS`, or "auto": what fits `platform`."""
    return WAYS[name] if name != "auto" else fitting(platform)
