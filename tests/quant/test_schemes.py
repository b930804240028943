"""Codes and values against a slow numpy reading of the papers; error bounds; exact sizes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.quant import NF4, Int4, Int8
from jlora.tree import nbytes

# QLoRA, appendix E
NORMAL_FLOATS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NORMAL_FLOATS += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NORMAL_FLOATS += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
NORMAL_FLOATS += [0.7229568362236023, 1.0]


def weight(i, o, seed=0):
    return (np.random.default_rng(seed).standard_normal((i, o)) * 0.03).astype(np.float32)


def nearest(table, x):
    """The lower of two that are equally near."""
    return int(np.argmin(np.abs(np.asarray(table, np.float32) - np.float32(x))))


def dynamic_map():
    """Dettmers et al. 2021: sign, an exponent by leading zeros, the rest a linear fraction of [0.1, 1]."""
    out = [0.0, 1.0]
    for zeros in range(7):
        parts = 2 ** (6 - zeros)
        edges = [0.1 + 0.9 * n / parts for n in range(parts + 1)]
        for low, high in itertools.pairwise(edges):
            out += [sign * 10.0**-zeros * (low + high) / 2 for sign in (1, -1)]
    return sorted(out)


def by_paper(w):
    """(bytes of the codes, values) of a torch weight [o, i]: flattened, blocks of 64, absmax in 8 bits."""
    flat, table = w.ravel(), dynamic_map()
    blocks = flat.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    codes = np.array([nearest(NORMAL_FLOATS, x) for x in (blocks * (1 / absmax)[:, None]).ravel()])
    apart = absmax - absmax.mean()
    second = []
    for at in range(0, len(apart), 256):
        some = apart[at : at + 256]
        largest = np.abs(some).max()
        second += [np.float32(table[nearest(table, x / largest)]) * largest for x in some]
    values = (
        np.array(NORMAL_FLOATS, np.float32)[codes].reshape(blocks.shape) * (np.array(second) + absmax.mean())[:, None]
    )
    return codes[::2] * 16 + codes[1::2], values.reshape(w.shape)


def test_nf4_is_the_papers_and_the_bytes_are_bitsandbytes():
    w = weight(192, 130)  # 390 absmax: two blocks of the second quantisation
    parts = jax.jit(NF4().encode)(w)
    codes, values = by_paper(w.T)
    np.testing.assert_array_equal(np.asarray(parts["codes"]).T.ravel(), codes)
    np.testing.assert_allclose(NF4().decode(parts, 192), values.T, rtol=0, atol=1e-7)


def test_the_sixteen_values_and_a_tie_goes_down():
    table = np.array(NORMAL_FLOATS, np.float32)
    middles = (table[1:] + table[:-1]) / 2
    column = np.concatenate([table, middles, np.nextafter(middles, 1), [1.0] * 18])[:, None].astype(np.float32)
    scheme = NF4(double=False)
    values = np.asarray(scheme.decode(jax.jit(scheme.encode)(column), 64))[:, 0]
    np.testing.assert_array_equal(values, np.concatenate([table, table[:-1], table[1:], [1.0] * 18]))


SCHEMES = [NF4(), NF4(double=False), Int4(), Int4(32, zero_point=True), Int8()]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [256, 77])  # whole blocks; an odd number, the last block short
def test_errors_are_within_half_a_step(scheme, rows):
    w = weight(rows, 5) + np.float32(0.01)
    w[:, 3] = 0
    parts = jax.jit(scheme.encode)(w)
    error = np.abs(np.asarray(scheme.decode(parts, rows)) - w)
    assert scheme.decode(parts, rows).dtype == jnp.float32 and np.all(error[:, 3] == 0)
    if isinstance(scheme, NF4):
        size = np.repeat([np.abs(w[n : n + 64]).max(axis=0) for n in range(0, rows, 64)], 64, axis=0)[:rows]
        step = np.diff(NORMAL_FLOATS).max() * size
        # an absmax in 8 bits is off by at most half the map's widest step, 0.9/64, of the farthest one's distance
        apart = np.abs(size - size[::64].mean()).max() * 0.9 / 128 if scheme.double else 0
        assert np.all(error <= step / 2 + apart + 1e-8)
        return
    scale = np.asarray(parts["scale"], np.float32)
    scale = np.repeat(scale, scheme.group, axis=0)[:rows] if isinstance(scheme, Int4) else scale[None]
    bound = 0.56 if scheme == Int4(32, zero_point=True) else 0.5
    assert np.all(error <= bound * scale * (1 + 1e-5))


def test_bits_a_weight():
    def bits(scheme):
        parts = jax.eval_shape(scheme.encode, jax.ShapeDtypeStruct((4096, 1024), jnp.float32))
        return 8 * nbytes(parts) / (4096 * 1024)

    assert bits(NF4()) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / (4096 * 1024)
    assert round(bits(NF4()), 3) == 4.127
    assert [bits(s) for s in SCHEMES[1:]] == [4.5, 4.25, 4 + 24 / 32, 8 + 32 / 4096]
