"""Intrinsic dimension: all weights move together inside a random subspace of D numbers, W = W0 + P(theta).

Li et al. 2018 (1804.08838); structure-aware SAID, with a trained scale a weight matrix (Aghajanyan et al. 2021,
2012.13255, section 3.1). Three projections, none of them stored:
- "dense": rows of N(0, 1/D) entries drawn again at every use, block by block: slow;
- "sparse": every number of W sums four of theta's with random signs, drawn again at every use;
- "fastfood" (Le et al. 2013): H G Pi H B in blocks of a power of two.
Each gives a number the expected square |theta|^2 / D, D the dimension. Departure: "sparse" is a count sketch
with K entries a row, where Li et al. draw about sqrt(n) a column.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.leaves import as_array
from jlora.lora import Adapter
from jlora.methods.plant import floats_of, held, leaves_of, replaced
from jlora.tree import STACK, Targets, select, slashed

ENTRIES = 4
BLOCK = 1 << 18


def dense(key: Any, theta: jax.Array, n: int) -> jax.Array:
    """[n] of theta [D] by a matrix whose rows are drawn block by block."""
    rows = min(n, max(1, BLOCK // theta.size))

    def block(_: Any, k: Any) -> tuple[None, jax.Array]:
        return None, jax.random.normal(k, (rows, theta.size), theta.dtype) @ theta / theta.size**0.5

    # remade in the gradient, as in the value: a block's matrix is never kept
    _, out = jax.lax.scan(jax.checkpoint(block), None, jax.random.split(key, -(-n // rows)))
    return out.ravel()[:n]


def sparse(key: Any, theta: jax.Array, n: int) -> jax.Array:
    """[n]: each the signed sum of `ENTRIES` of theta's numbers."""
    out = jnp.zeros(n, theta.dtype)
    for k in jax.random.split(key, ENTRIES):
        place, sign = jax.random.split(k)
        signs = jax.random.rademacher(sign, (n,), theta.dtype)
        out += theta[jax.random.randint(place, (n,), 0, theta.size)] * signs
    return out / ENTRIES**0.5


def hadamard(x: jax.Array) -> jax.Array:
    """The Walsh-Hadamard transform of the last axis, its length m a power of two, times 1/sqrt(m).

    As products with the matrices of its Kronecker factors, of at most 128 rows: m * 128 operations each instead of a
    pass over memory for every bit of m.
    """
    m = x.shape[-1]
    whole, factors = x.shape, [min(128, m >> done) for done in range(0, m.bit_length() - 1, 7)]
    x = x.reshape(*x.shape[:-1], *factors)
    for axis, n in enumerate(factors, len(whole) - 1):
        x = jnp.moveaxis(jnp.matmul(jnp.moveaxis(x, axis, -1), sylvester(n), precision="highest"), -1, axis)
    return x.reshape(whole)


def sylvester(n: int) -> np.ndarray:
    """Hadamard's matrix [n, n] in Sylvester's order, orthonormal: (-1)^(bits that row and column share) / sqrt(n)."""
    bits = np.arange(n)
    shared = np.bitwise_count(bits[:, None] & bits).astype(np.float32)
    return (1 - 2 * (shared % 2)) / np.float32(n) ** 0.5


def places(key: Any, rows: int, m: int) -> jax.Array:
    """u32 [rows, m]: a permutation of 0 .. m - 1 a row, m a power of two, by rounds of odd multiples and shifts: a sort
    of random numbers would take most of a step."""
    at = jnp.broadcast_to(jnp.arange(m, dtype=jnp.uint32), (rows, m))
    for k in jax.random.split(key, 4):
        odd, more = jax.random.bits(k, (2, rows, 1), jnp.uint32)
        at = (at * (odd | 1) + more) & (m - 1)
        at ^= at >> max(1, m.bit_length() // 2)
    return at


def fastfood(key: Any, theta: jax.Array, n: int) -> jax.Array:
    """[n], in blocks of the power of two m >= D: H G Pi H B theta, each block with its own draw of B, Pi, G."""
    m = 1 << max(1, (theta.size - 1).bit_length())
    padded, rows = jnp.pad(theta, (0, m - theta.size)), min(-(-n // m), max(1, BLOCK // m))

    def blocks(_: Any, k: Any) -> tuple[None, jax.Array]:
        sign, order, gauss = jax.random.split(k, 3)
        g = jax.random.normal(gauss, (rows, m), theta.dtype)
        h = hadamard(jax.random.rademacher(sign, (rows, m), theta.dtype) * padded)
        h = hadamard(jnp.take_along_axis(h, places(order, rows, m), 1) * g)
        return None, h * (m / theta.size) ** 0.5

    _, out = jax.lax.scan(jax.checkpoint(blocks), None, jax.random.split(key, -(-n // (rows * m))))
    return out.ravel()[:n]


PROJECTIONS = {"dense": dense, "sparse": sparse, "fastfood": fastfood}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subspace(Adapter):
    """theta [D], and with SAID one scale a weight, [s] for a stack; it stands at the root, around the whole tree.

    One projection, drawn from `seed`, gives all weights' numbers in tree order: what is saved is theta and a number.
    """

    theta: Any
    scales: Any
    chosen: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    projection: str = dataclasses.field(metadata={"static": True})
    size: float = dataclasses.field(metadata={"static": True})
    seed: int = dataclasses.field(metadata={"static": True})

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> Any:
        """The tree of weights W0 + P(theta), arrays: the difference has no small factors to keep apart."""
        leaves = leaves_of(w)
        arrays = {name: as_array(held(leaves, name, path)) for name, _ in self.chosen}
        ends = list(itertools.accumulate(x.size for x in arrays.values()))
        drawn = PROJECTIONS[self.projection](jax.random.key(self.seed), self.size * self.theta, ends[-1])
        moved = {}
        for (name, base), end in zip(arrays.items(), ends, strict=True):
            delta = drawn[end - base.size : end].reshape(base.shape)
            if self.scales is not None:
                scale = self.scales[name]
                delta = delta * scale.reshape(scale.shape + (1,) * (base.ndim - scale.ndim))
            moved[name] = (base + delta).astype(base.dtype)
        return replaced(w, moved)

    def describe(self) -> str:
        return f"{self.theta.size:,} numbers, {self.projection}, in {len(self.chosen)} weights"


def make(
    params: Any,
    dimension: int,
    *,
    projection: str = "fastfood",
    said: bool = True,
    train: Targets = lambda path, leaf: True,
    size: float = 0.01,
    seed: int = 0,
    dtype: Any = jnp.float32,
    key: Any = None,
) -> tuple[Any, Subspace]:
    """(frozen, trained): theta [dimension] moves the leaves of floats that `train` means (all, if not given).

    said: with a trained scale a weight (a row of a stack each its own), which start at 1; they count in `dimension`.
    size: the difference's root mean square a unit of theta's. key: unused; `seed` makes the projection.
    Raises ValueError for an unknown projection, or a dimension not above the number of scales.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection {projection!r} is not known: {', '.join(PROJECTIONS)} are")
    leaves = floats_of(params)
    chosen = tuple(
        (path, leaves[path].shape[0] if STACK.search(slashed(path)) and len(leaves[path].shape) > 1 else 0)
        for path in select(train, leaves, "train")
    )
    scales = {path: jnp.ones((rows,) if rows else (), dtype) for path, rows in chosen} if said else None
    left = dimension - sum(s.size for s in (scales or {}).values())
    if left < 1:
        raise ValueError(f"dimension {dimension}: SAID's scales alone are {dimension - left}; take more, or said=False")
    return params, Subspace(jnp.zeros(left, dtype), scales, chosen, projection, size, seed)
