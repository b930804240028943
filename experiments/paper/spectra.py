"""Directions of matrices: overlaps of subspaces, spectra, amplification (Hu et al., sections 7.2, 7.3 and appendix H).

Matrices are [in, out] as in jlora; the paper's right-singular directions of A (r x d) are left-singular ones here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora.analysis import matrices


def basis(a: Any) -> np.ndarray:
    """Left singular vectors [d, r] of a [d, r], largest first."""
    return np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)[0]


def overlaps(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """phi [i, j] = ||U_i^T V_j||_F^2 / min(i, j) for the first i and j directions, from 1 (equation 4)."""
    sums = ((u.T @ v) ** 2).cumsum(0).cumsum(1)
    i, j = np.indices(sums.shape) + 1
    return sums / np.minimum(i, j)


def gaussian(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def effective_rank(s: np.ndarray) -> float:
    """(sum s)^2 / sum s^2 of singular values: how many would carry as much if they were equal."""
    return float(s.sum() ** 2 / (s**2).sum())


def energy(s: np.ndarray, k: int) -> float:
    """The share of ||W||_F^2 in the first k directions."""
    return float((s[:k] ** 2).sum() / (s**2).sum())


def delta(entry: Any, layer: int) -> np.ndarray:
    """scaling * A·B of one matrix of the stack, [in, out]."""
    a, b = (np.asarray(x[layer], np.float64) for x in matrices(entry))
    return entry.scaling * a @ b


def amplified(w: Any, change: np.ndarray, rank: int) -> dict[str, float]:
    """Table 7 for one matrix: ||U^T W V||_F with U, V the first `rank` directions of the change, of W itself and of a
    random matrix; the norms of W and of the change; factor: the change's norm over the first."""
    w = np.asarray(w, np.float64)

    def seen(by: np.ndarray) -> float:
        u, _, vt = np.linalg.svd(by, full_matrices=False)
        return float(np.linalg.norm(u[:, :rank].T @ w @ vt[:rank].T))

    of_change, size = seen(change), float(np.linalg.norm(change))
    return {
        "of change": of_change,
        "of W": seen(w),
        "of random": seen(gaussian(change.shape)),
        "W": float(np.linalg.norm(w)),
        "change": size,
        "factor": size / of_change,
    }
