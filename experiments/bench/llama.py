"""A Llama written by hand in plain jax.numpy, layers scanned; `linear` says how a weight is used.

Needs JAX alone, of any age. Axes as in jlora/models/llama.py.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EPS = 1e-5


class Sizes(NamedTuple):
    """Of SmolLM2-135M."""

    layers: int = 30
    heads: int = 9
    groups: int = 3
    k: int = 64
    theta: float = 100000.0


def read_folder(folder: str | Path) -> dict[str, Any]:
    """{embed, norm, layers: {projection [l, in, out], two norms [l, d]}} of a folder in Hub format."""
    raw = (Path(folder) / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])

    def tensor(name: str) -> np.ndarray:
        start, end = header[name]["data_offsets"]
        return np.frombuffer(raw, np.float32, (end - start) // 4, 8 + size + start).reshape(header[name]["shape"])

    def stack(name: str) -> jax.Array:
        rows = [tensor(f"model.layers.{n}.{name}.weight") for n in range(Sizes().layers)]
        return jnp.asarray(np.stack([row.T if row.ndim == 2 else row for row in rows]))

    where = {name: f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in PROJECTIONS}
    layers = {name: stack(dotted) for name, dotted in where.items()}
    layers |= {name: stack(name) for name in ("input_layernorm", "post_attention_layernorm")}
    return {
        "embed": jnp.asarray(tensor("model.embed_tokens.weight")),
        "norm": jnp.asarray(tensor("model.norm.weight")),
        "layers": layers,
    }


def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


def rotate(x: jax.Array, c: Sizes) -> jax.Array:
    """x [b, s, h, k] at positions 0 .. s - 1."""
    half = c.k // 2
    angle = jnp.arange(x.shape[1])[:, None] * c.theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, c: Sizes) -> jax.Array:
    b, s = q.shape[:2]
    q = q.reshape(b, s, c.groups, -1, c.k)
    scores = jnp.einsum("bsgrk,btgk->bgrst", q, k) * c.k**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bgrst,btgk->bsgrk", jax.nn.softmax(scores), v).reshape(b, s, -1)


def layer(x: jax.Array, w: Any, linear: Any, c: Sizes) -> jax.Array:
    """`linear(x, w, name)`: x times the weight `name` of the layer w."""
    b, s = x.shape[:2]
    h = rms(x, w["input_layernorm"])
    q, k, v = (linear(h, w, f"{name}_proj").reshape(b, s, -1, c.k) for name in "qkv")
    x = x + linear(attend(rotate(q, c), rotate(k, c), v, c), w, "o_proj")
    h = rms(x, w["post_attention_layernorm"])
    return x + linear(jax.nn.silu(linear(h, w, "gate_proj")) * linear(h, w, "up_proj"), w, "down_proj")


def loss(
    embed: Any, norm: Any, layers: Any, tokens: jax.Array, labels: jax.Array, linear: Any, scan: bool = True
) -> jax.Array:
    """Mean cross-entropy of labels [b, s]. layers: a pytree stacked over layers, or (not scan) a list of them."""
    c = Sizes()
    step = lambda x, w: layer(x, w, linear, c)
    x = embed[tokens]
    if scan:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        kept = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(lambda x, w: (kept(x, w), None), x, layers)
    else:
        for w in layers:
            x = step(x, w)
    logits = rms(x, norm) @ embed.T
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)
