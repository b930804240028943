"""Rotary position embedding (Su et al. 2021), in the half-split order of the Hub's checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rope_of(hub: Mapping[str, Any]) -> tuple[float, tuple[tuple[str, Any], ...] | None]:
    """(theta, scaling or None) of a `config.json`: `rope_parameters`, or the older `rope_scaling` and `rope_theta`."""
    rope = dict(hub.get("rope_parameters") or hub.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hub.get("rope_theta") or 10000.0
    older = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or older or "default"
    return float(theta), None if rope["rope_type"] == "default" else tuple(sorted(rope.items()))


def frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> np.ndarray:
    """Radians per position, f64 [head_dim / 2]. Raises ValueError for a kind of scaling that is not written here.

    `scaling`: the Hub's `rope_scaling`: default, linear, or llama3 (long wavelengths divided by `factor`, short ones
    kept, those between interpolated).
    """
    base = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if scaling is None or kind == "default":
        return base
    if kind == "linear":
        return base / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * base / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return base * (kept + (1 - kept) / scaling["factor"])
    raise ValueError(f"rope_scaling of type {kind!r} is not supported: default, linear and llama3 are")


def rotate(x: jax.Array, positions: jax.Array, freqs: np.ndarray | jax.Array) -> jax.Array:
    """x [b, s, h, k] turned by its positions i32 [b, s]; angles in float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
