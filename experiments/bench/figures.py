"""Median, minimum, and the ratio of two contestants with a bootstrap interval over rounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ratio(others: Sequence[float], ours: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """(median of theirs / median of ours, and its 95 % interval): rounds are drawn in pairs, as they were run."""
    a, b = np.asarray(others), np.asarray(ours)
    drawn = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    many = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.quantile(many, (0.025, 0.975))
    return float(np.median(a) / np.median(b)), float(low), float(high)


def matmul_peak(size: int = 1536, tries: int = 30) -> float:
    """GFLOP/s of a float32 product of two [size, size] matrices: the fastest of `tries`."""
    import time

    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def step_flops(tokens: int, rank: int, targets: Sequence[str]) -> float:
    """FLOPs of the least step of SmolLM2-135M: forward, gradients of inputs, factors; every token a label."""
    d, f, kv, layers, vocab = 576, 1536, 192, 30, 49152
    sizes = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
    sizes |= {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    base = 4.0 * tokens * (layers * sum(i * o for i, o in sizes.values()) + vocab * d)
    thin = 6.0 * tokens * rank * layers * sum(sum(sizes[name]) for name in targets)
    return base + thin
