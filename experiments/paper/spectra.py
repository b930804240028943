"""Directions of matrices: overlaps of subspaces, spectra, amplification (Hu et al., sections 7.2, 7.3 and appendix H).

Matrices are [in, out] as in jlora; the paper's right-singular directions of A (r x d) are left-singular ones here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def basis(a: Any) -> np.ndarray:
    """Left singular vectors [d, r] of a [d, r], largest first."""
    return svd(a)[0]


def overlaps(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """phi [i, j] = ||U_i^T V_j||_F^2 / min(i, j) for the first i and j directions, from 1 (equation 4)."""
    sums = ((u.T @ v) ** 2).cumsum(0).cumsum(1)
    i, j = np.indices(sums.shape) + 1
    return sums / np.minimum(i, j)


def kept(size: int) -> list[int]:
    """The i and j that a map keeps of 1 to `size`: the first eight, then every fourth, as phi is a running mean."""
    return [*range(1, min(size, 8) + 1), *range(12, size + 1, 4)]


def doubled(size: int) -> list[int]:
    """1, 2, 4 and so on to `size`: how many of W's directions a map counts."""
    return [2**n for n in range(size.bit_length())]


def thinned(phi: np.ndarray, i: Sequence[int], j: Sequence[int]) -> list[list[float]]:
    """phi at `i` and `j`, to three digits."""
    return np.round(phi[np.ix_(np.array(i) - 1, np.array(j) - 1)], 3).tolist()


def gaussian(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def effective_rank(s: np.ndarray) -> float:
    """(sum s)^2 / sum s^2 of singular values: how many would carry as much if they were equal."""
    return float(s.sum() ** 2 / (s**2).sum())


def energy(s: np.ndarray, k: int) -> float:
    """The share of ||W||_F^2 in the first k directions."""
    return float((s[:k] ** 2).sum() / (s**2).sum())


Svd = tuple[np.ndarray, np.ndarray, np.ndarray]


def svd(w: Any) -> Svd:
    return np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)


def svd_of_product(a: Any, b: Any) -> Svd:
    """Of A·B, a [d, r] and b [r, o], by that of an r x r matrix: (u [d, r], s [r], vt [r, o])."""
    qa, ra = np.linalg.qr(np.asarray(a, np.float64))
    qb, rb = np.linalg.qr(np.asarray(b, np.float64).T)
    u, s, vt = np.linalg.svd(ra @ rb.T)
    return qa @ u, s, vt @ qb.T


def amplified(w: Any, of_w: Svd, change: Svd, rank: int, seed: int = 0) -> dict[str, float]:
    """Table 7 for one matrix: ||U^T W V||_F with U, V the first `rank` directions of the change, of W itself and random
    ones; the norm of W, and that of the change in its first `rank` directions; factor: the latter over the first."""
    w = np.asarray(w, np.float64)
    seen = lambda u, vt: float(np.linalg.norm(u[:, :rank].T @ w @ vt[:rank].T))
    left, right = (np.linalg.qr(gaussian((size, rank), seed + n))[0] for n, size in enumerate(w.shape))
    of_change, size = seen(change[0], change[2]), float(np.linalg.norm(change[1][:rank]))
    return {
        "of change": of_change,
        "of W": seen(of_w[0], of_w[2]),
        "of random": seen(left, right.T),
        "W": float(np.linalg.norm(w)),
        "change": size,
        "factor": size / of_change,
    }
