"""How the factors start. Each init takes a matrix w [i, o] and gives lora_a [i, r] and lora_b [r, o] in float32.

The adapted function starts as the base function. PiSSA and OLoRA start with a product that is not zero, so that
`lorafy` takes scaling * lora_a·lora_b off the base (`CHANGES_BASE`); of the others only w's shape is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Init = Callable[[Any, Any, int, float], tuple[jax.Array, jax.Array]]


def kaiming(key: Any, w: Any, rank: int, scaling: float) -> tuple[jax.Array, jax.Array]:
    """A uniform in ±1/sqrt(i), B zero: kaiming_uniform(a=sqrt(5)), as in the released loralib and PEFT."""
    bound = w.shape[0] ** -0.5
    return jax.random.uniform(key, (w.shape[0], rank), minval=-bound, maxval=bound), jnp.zeros((rank, w.shape[1]))


def gaussian(key: Any, w: Any, rank: int, scaling: float) -> tuple[jax.Array, jax.Array]:
    """A normal with deviation 1/r, B zero (Hu et al., section 4.1; the deviation is PEFT's)."""
    return jax.random.normal(key, (w.shape[0], rank)) / rank, jnp.zeros((rank, w.shape[1]))


def pissa(key: Any, w: Any, rank: int, scaling: float) -> tuple[jax.Array, jax.Array]:
    """The top r singular directions of W, each factor with the root of the singular values (Meng et al. 2024)."""
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank] / scaling)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def olora(key: Any, w: Any, rank: int, scaling: float) -> tuple[jax.Array, jax.Array]:
    """The first r columns of Q and rows of R of W = QR (Büyükakyüz 2024), the scaling divided out of R."""
    q, r = jnp.linalg.qr(w.astype(jnp.float32))
    return q[:, :rank], r[:rank] / scaling


INITS: dict[str, Init] = {"kaiming": kaiming, "gaussian": gaussian, "pissa": pissa, "olora": olora}
CHANGES_BASE = {"pissa", "olora"}
