"""What an adapter learnt: singular values and subspaces, from the factors alone (Hu et al., section 7)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora.lora import LoraFactors


def matrices(entry: LoraFactors) -> tuple[jax.Array, jax.Array]:
    """(A [s, i, r], B [s, r, o]) with all axes of one kind flattened; s = 1 without a stack."""
    rank, stack = entry.lora_a.shape[-1], entry.layout.count("s")
    shape = entry.lora_a.shape[:stack]
    count = 1
    for size in shape:
        count *= size
    return entry.lora_a.reshape(count, -1, rank), entry.lora_b.reshape(count, rank, -1)


def spectrum(entry: LoraFactors) -> jax.Array:
    """Singular values of scaling * A·B, f32 [s, r], largest first: of an r x r matrix, A·B is never built."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        small = jnp.linalg.qr(a)[1] @ jnp.linalg.qr(b.T)[1].T
        return jnp.linalg.svd(small, compute_uv=False) * entry.scaling

    return jax.vmap(one)(*(x.astype(jnp.float32) for x in matrices(entry)))


def similarity(a: Any, b: Any, i: int, j: int) -> jax.Array:
    """phi(A1, A2, i, j) = ||U1_i^T U2_j||_F^2 / min(i, j) in [0, 1] (equation 4).

    a, b: [d, r] matrices whose left singular vectors are compared, the first i of one with the first j of the other.
    """
    u = jnp.linalg.svd(a, full_matrices=False)[0][:, :i]
    v = jnp.linalg.svd(b, full_matrices=False)[0][:, :j]
    return jnp.sum((u.T @ v) ** 2) / min(i, j)


def amplification(w: Any, entry_a: Any, entry_b: Any, scaling: float, rank: int) -> dict[str, jax.Array]:
    """How much A·B amplifies directions that W has but does not stress (section 7.3), for one matrix.

    w: [i, o]; entry_a [i, r], entry_b [r, o]. {"task": ||U^T W V||_F in the first `rank` directions of A·B, "delta":
    ||scaling A·B||_F in the same (all of it for rank = r, as in table 7), "factor": their ratio, "weight": ||W||_F}.
    """
    delta = scaling * entry_a @ entry_b
    u, s, vt = jnp.linalg.svd(delta, full_matrices=False)
    task = jnp.linalg.norm(u[:, :rank].T @ w @ vt[:rank].T)
    norm = jnp.linalg.norm(s[:rank])
    return {"task": task, "delta": norm, "factor": norm / task, "weight": jnp.linalg.norm(w)}
