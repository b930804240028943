"""How one matrix is written in 8 or 4 bits. `encode` gives named arrays, `decode` the matrix again.

Axes: i inputs (contracted), o outputs, n blocks. A block is a run of inputs of one output, which is the order of
bitsandbytes: torch keeps a weight as [o, i] and blocks its flattened rows. Two codes are a byte, the even input's in
the high half, as there: bitsandbytes' bytes are `codes` [i/2, o] transposed. Departure: where i is no multiple of the
block, the last block of an output is short; theirs runs on into the next row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Parts = dict[str, Any]


class Scheme(Protocol):
    """`along`: for each array of `encode` the axes it runs along, i or o each, "" for none of them."""

    along: ClassVar[dict[str, str]]

    def encode(self, w: jax.Array) -> Parts:
        """f32 [i, o] -> arrays."""
        ...

    def decode(self, parts: Parts, rows: int) -> jax.Array:
        """The arrays -> f32 [i, o], i = rows."""
        ...


NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 4-bit NormalFloat (QLoRA, appendix E): quantiles of N(0, 1) scaled to [-1, 1], with an exact zero."""


@dataclasses.dataclass(frozen=True)
class NF4:
    """NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3).

    w = value[code] * absmax of the block. `double`: the absmax less their mean are themselves in 8 bits, in blocks of
    256 (in the order of the flattened [o, n]): 4 + 8/64 + 32/(64·256) = 4.127 bits a weight, and 4 bytes a matrix.
    A tie goes to the lower value.
    """

    block: int = 64
    double: bool = True

    along: ClassVar[dict[str, str]] = {"codes": "io", "absmax": "io", "outer": "", "mean": ""}

    def encode(self, w: jax.Array) -> Parts:
        absmax = block_max(jnp.abs(w), self.block)
        inverse = jnp.where(absmax > 0, 1 / absmax, 0)
        values = np.asarray(NF4_VALUES, np.float32)
        codes = jnp.searchsorted((values[1:] + values[:-1]) / 2, w * spread(inverse, self.block, w.shape[0]))
        parts = {"codes": pack(codes)}
        return parts | (encode_absmax(absmax) if self.double else {"absmax": absmax})

    def decode(self, parts: Parts, rows: int) -> jax.Array:
        absmax = decode_absmax(**{name: parts[name] for name in ("absmax", "outer", "mean")} if self.double else parts)
        return choose(NF4_VALUES, unpack(parts["codes"], rows)) * spread(absmax, self.block, rows)


@dataclasses.dataclass(frozen=True)
class Int4:
    """w = (code - zero) * scale in groups of `group` inputs; zero is 8, or with `zero_point` each group's own, 0 to 15.

    scale is bfloat16, and the codes are taken by the rounded scale: |error| <= scale/2, with a zero point 0.56 scale
    (the group's end may be cut). 4 + 16/group bits a weight, 24/group with zero points.
    """

    group: int = 64
    zero_point: bool = False

    along: ClassVar[dict[str, str]] = {"codes": "io", "scale": "io", "zero": "io"}

    def encode(self, w: jax.Array) -> Parts:
        if self.zero_point:
            low = jnp.minimum(-block_max(-w, self.group), 0)
            high = jnp.maximum(block_max(w, self.group), 0)
            scale = usable((high - low) / 15)
            zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, 15)
            extra, at = {"zero": zero.astype(jnp.uint8)}, spread(zero, self.group, w.shape[0])
        else:
            scale = usable(block_max(jnp.abs(w), self.group) / 7)
            extra, at = {}, 8
        codes = jnp.clip(jnp.round(w / spread(scale.astype(jnp.float32), self.group, w.shape[0])) + at, 0, 15)
        return {"codes": pack(codes), "scale": scale, **extra}

    def decode(self, parts: Parts, rows: int) -> jax.Array:
        codes = unpack(parts["codes"], rows).astype(jnp.int8)
        zero = spread(parts["zero"].astype(jnp.int8), self.group, rows) if self.zero_point else jnp.int8(8)
        return (codes - zero).astype(jnp.float32) * spread(parts["scale"].astype(jnp.float32), self.group, rows)


@dataclasses.dataclass(frozen=True)
class Int8:
    """w = code * scale, a scale [o] an output, code in -127..127: |error| <= scale/2.

    8 bits a weight and 32 an output.
    """

    along: ClassVar[dict[str, str]] = {"codes": "io", "scale": "o"}

    def encode(self, w: jax.Array) -> Parts:
        most = jnp.max(jnp.abs(w), axis=0)
        scale = jnp.where(most == 0, 1, most / 127)
        return {"codes": jnp.round(w / scale).astype(jnp.int8), "scale": scale}

    def decode(self, parts: Parts, rows: int) -> jax.Array:
        return parts["codes"].astype(jnp.float32) * parts["scale"]


SCHEMES: dict[str, Any] = {"nf4": NF4(), "int8": Int8(), "int4": Int4()}


def scheme_of(given: Any) -> Any:
    """A scheme, or the one of this name. Raises ValueError."""
    if not isinstance(given, str):
        return given
    if given not in SCHEMES:
        raise ValueError(f"scheme {given!r} is not known: {', '.join(SCHEMES)} are, or NF4(...), Int4(...), Int8()")
    return SCHEMES[given]


# ---------------------------------------------------------------- blocks and bytes


def block_max(x: jax.Array, block: int) -> jax.Array:
    """The largest of each block: [i, o] -> [n, o]; the last block may be short."""
    rows = -(-x.shape[0] // block) * block
    padded = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)), constant_values=-jnp.inf)
    return padded.reshape(-1, block, x.shape[1]).max(axis=1)


def spread(each: jax.Array, block: int, rows: int) -> jax.Array:
    """[n, o] -> [rows, o], a block's value at each of its inputs."""
    wide = jnp.broadcast_to(each[:, None, :], (each.shape[0], block, each.shape[1]))
    return wide.reshape(-1, each.shape[1])[:rows]


def pack(codes: jax.Array) -> jax.Array:
    """Codes 0..15 [i, o] -> u8 [ceil(i/2), o], the even input in the high half."""
    codes = jnp.pad(codes.astype(jnp.uint8), ((0, codes.shape[0] % 2), (0, 0)))
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: jax.Array, rows: int) -> jax.Array:
    """u8 [ceil(rows/2), o] -> u8 [rows, o] in 0..15, without a concatenation: it fuses with what reads it."""
    halves = packed[:, None, :] >> jnp.array([4, 0], jnp.uint8)[None, :, None] & 15
    return halves.reshape(-1, packed.shape[1])[:rows]


def choose(values: Sequence[float], codes: jax.Array) -> jax.Array:
    """f32 values[codes], by selections on the codes' bits: vector units do these, and are slow at look-ups."""
    level: list[Any] = [jnp.float32(v) for v in values]
    bit = 0
    while len(level) > 1:
        on = (codes >> bit & 1) != 0
        level = [jnp.where(on, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
        bit += 1
    return level[0]


def usable(scale: jax.Array) -> jax.Array:
    """A scale in bfloat16, 1 for a block of zeros."""
    rounded = scale.astype(jnp.bfloat16)
    return jnp.where(rounded == 0, jnp.ones((), jnp.bfloat16), rounded)


# ---------------------------------------------------------------- double quantisation

OUTER = 256
"""Absmax a block of the second quantisation."""


def dynamic_value(step: Any, np: Any = jnp) -> Any:
    """The 8-bit dynamic map (Dettmers et al. 2021, arXiv 2110.02861, section 2.1): step in -127..128 -> [-1, 1].

    |step| in [2^e, 2^(e+1)) is 10^(e-6) times the middle of one of 2^e equal parts of [0.1, 1]; 128 is 1, 0 is 0.
    """
    size = np.abs(step)
    value = np.zeros_like(step, dtype=np.float32)
    for e in range(7):
        part = np.float32(10.0 ** (e - 6)) * (0.1 + 0.9 * (size - 2**e + 0.5) / 2**e)
        value = np.where(size >= 2**e, part, value).astype(np.float32)
    return np.sign(step) * np.where(step == 128, 1, value).astype(np.float32)


def encode_absmax(absmax: jax.Array) -> Parts:
    """f32 [n, o] -> u8 [n, o], the scale of every 256 of them [ceil(n·o/256)] and their mean []."""
    mean = jnp.mean(absmax)
    flat = (absmax - mean).T.ravel()
    blocks = jnp.pad(flat, (0, -flat.size % OUTER)).reshape(-1, OUTER)
    outer = jnp.max(jnp.abs(blocks), axis=1)
    table = dynamic_value(np.arange(-127, 129, dtype=np.float32), np)
    inverse = jnp.where(outer > 0, 1 / outer, 0)
    codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, blocks * inverse[:, None]).astype(jnp.uint8)
    codes = codes.ravel()[: flat.size].reshape(absmax.shape[::-1]).T
    return {"absmax": codes, "outer": outer, "mean": mean}


def decode_absmax(absmax: jax.Array, outer: Any = None, mean: Any = None, codes: Any = None) -> jax.Array:
    """f32 [n, o]; without `outer` the absmax are themselves."""
    if outer is None:
        return absmax
    n, o = absmax.shape
    each = jnp.broadcast_to(outer[:, None], (outer.shape[0], OUTER)).ravel()[: n * o].reshape(o, n).T
    return dynamic_value(absmax.astype(jnp.float32) - 127) * each + mean
