"""Gemma 3 (text) in Flax Linen: local and global layers, norms before and after, q/k norms.

Axes as in `jlora/models/llama.py`. Module names are the Hub's. A layer's kind is data (a scanned flag), so that all
layers are one stack.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.attention import Sight
from jlora.models.causal import Decoder, attended
from jlora.models.heads import tied_head
from jlora.models.hub import check_causal, refuse_others
from jlora.models.layers import layer_input, stacked, through
from jlora.models.rope import frequencies, rope_of, rotate
from jlora.models.tensors import HFTensor, dense_tensors, layer_tensors, norm_tensors


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes and switches, under the Hub's names; `local`: which layers see `sliding_window` tokens only."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    sliding_window: int
    local: tuple[bool, ...]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_local_base_freq: float = 10_000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    rope_local_scaling: tuple[tuple[str, Any], ...] | None = None
    tie_word_embeddings: bool = True
    model_type: str = "gemma3_text"

    @classmethod
    def from_hf(cls, hub: Mapping[str, Any]) -> GemmaConfig:
        """From a `config.json`. Raises ValueError for a field whose value changes results and is not supported."""
        only = {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "tie_word_embeddings": True,
        }
        refuse_others(hub, only, "gemma3")
        check_causal(hub)
        count = hub["num_hidden_layers"]
        every = hub.get("sliding_window_pattern") or hub.get("_sliding_window_pattern") or 6
        default = ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(count)]
        kinds = hub.get("layer_types") or default
        if len(kinds) != count or not {*kinds} <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types of {count} layers are {count} of full_attention and sliding_attention")
        rope = hub.get("rope_parameters") or {}
        whole = {"rope_parameters": rope.get("full_attention"), "rope_scaling": hub.get("rope_scaling")}
        theta, scaling = rope_of({**whole, "rope_theta": hub.get("rope_theta") or 1_000_000.0})
        near = {"rope_parameters": rope.get("sliding_attention"), "rope_theta": hub.get("rope_local_base_freq")}
        near_theta, near_scaling = rope_of(near)
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = cls(
            **{name: hub[name] for name in same},
            num_key_value_heads=hub["num_key_value_heads"],
            head_dim=hub["head_dim"],
            query_pre_attn_scalar=hub.get("query_pre_attn_scalar", 256),
            sliding_window=hub["sliding_window"],
            local=tuple(kind == "sliding_attention" for kind in kinds),
            rms_norm_eps=hub.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_local_base_freq=near_theta,
            rope_scaling=scaling,
            rope_local_scaling=near_scaling,
        )
        config.frequencies()
        return config

    def frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotary frequencies f64 [k / 2] of local and of global layers."""
        near, far = (dict(scaling or ()) for scaling in (self.rope_local_scaling, self.rope_scaling))
        return (
            frequencies(self.head_dim, self.rope_local_base_freq, near),
            frequencies(self.head_dim, self.rope_theta, far),
        )


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), in float32."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d] -> [..., d]."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * (1.0 + scale.astype(jnp.float32))).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    config: GemmaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, kv: Any, local: Any, positions: jax.Array, sight: Sight) -> Any:
        """x [b, s, d], kv as in Llama, local bool [] -> ([b, s, d], as `attended`)."""
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(RMSNorm, c.rms_norm_eps, self.dtype, self.param_dtype)
        near, far = (jnp.asarray(f, jnp.float32) for f in c.frequencies())
        freqs = jnp.where(local, near, far)

        def heads(name: str, count: int) -> jax.Array:
            y = dense(count * c.head_dim, name=f"{name}_proj")(x).reshape(*x.shape[:2], count, c.head_dim)
            return y if name == "v" else rotate(norm(name=f"{name}_norm")(y), positions, freqs)

        q, g = heads("q", c.num_attention_heads), c.num_key_value_heads
        sight = sight.within(c.sliding_window, local)
        out, new = attended(q, heads("k", g), heads("v", g), kv, sight, c.query_pre_attn_scalar**-0.5)
        return dense(c.hidden_size, name="o_proj")(out.reshape(*x.shape[:2], -1)), new


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), gelu by tanh."""

    config: GemmaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, d]."""
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        gate, up = (dense(self.config.intermediate_size, name=f"{name}_proj")(x) for name in ("gate", "up"))
        return dense(self.config.hidden_size, name="down_proj")(nn.gelu(gate) * up)


class Block(nn.Module):
    """One layer, in the form `nn.scan` wants: (x, what the layer has for itself, what all share) -> (x, new)."""

    config: GemmaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, own: Any, positions: jax.Array, sight: Sight) -> Any:
        """x [b, s, d], own (local, keys, values) or (local,) -> ([b, s, d], as `attended`)."""
        x = layer_input(x)
        parts = (self.config, self.dtype, self.param_dtype)
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, self.dtype, self.param_dtype)
        local, *kv = own
        y = norm(name="input_layernorm")(x)
        y, kv = Attention(*parts, name="self_attn")(y, tuple(kv) or None, local, positions, sight)
        x = x + norm(name="post_attention_layernorm")(y)
        y = MLP(*parts, name="mlp")(norm(name="pre_feedforward_layernorm")(x))
        return x + norm(name="post_feedforward_layernorm")(y), kv


class Gemma(Decoder):
    """The decoder; its head is the embedding, tied. Local layers' caches are as long as global ones'."""

    config: GemmaConfig

    def setup(self) -> None:
        """The parts; parameters are named as on the Hub."""
        c, parts = self.config, (self.config, self.dtype, self.param_dtype)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        self.layers = stacked(Block, parts, c.num_hidden_layers, 2, self.scan_layers, self.remat)
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype)

    def head(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] -> logits f32 [..., v]."""
        return tied_head(self.embed_tokens, hidden)

    def states(self, tokens: jax.Array, positions: jax.Array, kv: Any, sight: Sight) -> tuple[jax.Array, Any]:
        """As `Decoder.states`."""
        # the Hub's models round the scale to the embedding's precision
        x = self.embed_tokens(tokens) * jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        x, new = through(self.layers, x, (jnp.asarray(self.config.local), *(kv or ())), positions, sight)
        return self.norm(x), new


def hf_tensors(config: GemmaConfig, scan_layers: bool = True) -> list[HFTensor]:
    """Every tensor of the Hub's checkpoint and where it lies in the tree."""
    out = [HFTensor("model.embed_tokens.weight", "embed_tokens/embedding"), HFTensor("model.norm.weight", "norm/scale")]
    linears = [f"self_attn/{n}_proj" for n in "qkvo"] + [f"mlp/{n}_proj" for n in ("gate", "up", "down")]
    norms = [f"{n}_layernorm" for n in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
    norms += ["self_attn/q_norm", "self_attn/k_norm"]
    one = [tensor for name in linears for tensor in dense_tensors(name, bias=False)]
    one += [tensor for name in norms for tensor in norm_tensors(name, bias=False)]
    return out + layer_tensors("model.layers", "layers", config.num_hidden_layers, scan_layers, one)
