"""Median, minimum, and the ratio of two contestants with a bootstrap interval over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / fastest(jax.jit(lambda x: x @ x), x, tries=tries) / 1e9


def fastest(program: Any, *inputs: Any, tries: int) -> float:
    """Seconds of the fastest of `tries` calls, after one that compiles."""
    import time

    import jax

    seconds = []
    for _ in range(tries + 1):
        began = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def sizes() -> tuple[dict[str, tuple[int, int]], int, tuple[int, int]]:
    """(products of a layer of SmolLM2-135M: (in, out), layers, (d, vocabulary))."""
    d, f, kv = 576, 1536, 192
    square = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
    return square | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}, 30, (d, 49152)


def step_flops(tokens: int, rank: int, targets: Sequence[str]) -> float:
    """FLOPs of the least step of SmolLM2-135M: forward, gradients of inputs, factors; every token a label."""
    of, layers, (d, vocab) = sizes()
    base = 4.0 * tokens * (layers * sum(i * o for i, o in of.values()) + vocab * d)
    thin = 6.0 * tokens * rank * layers * sum(sum(of[name]) for name in targets)
    return base + thin


def own_products(tokens: int, tries: int = 10) -> float:
    """Seconds of the frozen products of that step by themselves, forward and towards the inputs, at their own shapes,
    each as soon as the one before: what a step without attention, adapter, loss or anything else would take."""
    import jax

    of, layers, head = sizes()
    made = lambda shape, n: jax.random.normal(jax.random.key(n), shape) * 0.02
    stacks = [made((layers, *shape), n) for n, shape in enumerate(of.values())]
    words = made((head[1], head[0]), 99)
    xs = [made((tokens, i), n) for n, (i, _) in enumerate(of.values())]

    def run(stacks: Any, words: Any, xs: Any) -> Any:
        def layer(xs: Any, ws: Any) -> Any:  # every product hangs on the layer before and none is thrown away
            forward = [x @ w for x, w in zip(xs, ws, strict=True)]
            return [y @ w.T for y, w in zip(forward, ws, strict=True)], None

        xs, _ = jax.lax.scan(layer, xs, stacks)
        logits = xs[0] @ words.T
        return xs, logits @ words

    return fastest(jax.jit(run), stacks, words, xs, tries=tries)
