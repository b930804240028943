"""The Llama family of decoders: Llama 1 to 3.3, Mistral, SmolLM2, Qwen 2, 2.5 and 3, in Flax Linen.

Axes: b batch, s sequence, t keys (the cache's length, or s), d model, f feed-forward, h heads, g key/value heads,
k head size, v vocabulary, l layers. Module names are the Hub's.
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
class LlamaConfig:
    """Sizes and switches, under the Hub's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    model_type: str = "llama"
    max_position_embeddings: int | None = None
    """Told to those who read what is written; the positions here have no end."""

    @classmethod
    def from_hf(cls, hub: Mapping[str, Any]) -> LlamaConfig:
        """From a `config.json`. Raises ValueError for a field whose value changes results and is not supported."""
        kind = hub["model_type"]
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            raise ValueError(f"model_type {kind!r} is no member of the Llama family")
        refuse_others(hub, {"hidden_act": "silu", "pretraining_tp": 1}, kind)
        check_causal(hub)
        theta, scaling = rope_of(hub)
        heads = hub["num_attention_heads"]
        if kind.startswith("qwen") and hub.get("use_sliding_window"):
            layers = hub.get("layer_types")
            beyond = hub.get("max_window_layers", 28) < hub["num_hidden_layers"]
            if "sliding_attention" in layers if layers else beyond:
                name = "layer_types" if layers else "max_window_layers"
                raise ValueError(f"use_sliding_window with a window in some layers ({name}) is not supported in {kind}")
        config = cls(
            vocab_size=hub["vocab_size"],
            hidden_size=hub["hidden_size"],
            intermediate_size=hub["intermediate_size"],
            num_hidden_layers=hub["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=hub.get("num_key_value_heads") or heads,
            head_dim=hub.get("head_dim") or hub["hidden_size"] // heads,
            rms_norm_eps=hub.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(hub.get("tie_word_embeddings", False)),
            qkv_bias=bool(hub.get("attention_bias", kind == "qwen2")) or kind == "qwen2",
            o_bias=bool(hub.get("attention_bias", False)) and kind != "qwen2",
            mlp_bias=bool(hub.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            sliding_window=hub.get("sliding_window", 4096) if kind == "mistral" else None,
            model_type=kind,
            max_position_embeddings=hub.get("max_position_embeddings"),
        )
        config.frequencies()
        return config

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `config.json`; `from_hf` gives this config back."""
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        held: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("rope_scaling", "qkv_bias", "o_bias", "qk_norm")
        }
        scaling = dict(self.rope_scaling or ())
        if scaling:  # transformers 4 and vLLM know this and rope_theta, transformers 5 rope_parameters
            held["rope_scaling"] = scaling
        if self.max_position_embeddings is None:
            del held["max_position_embeddings"]
        if self.model_type != "qwen2":
            held["attention_bias"] = self.qkv_bias
        return {
            "architectures": [f"{names[self.model_type]}ForCausalLM"],
            **held,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": self.rope_theta},
        }

    def frequencies(self) -> np.ndarray:
        """Rotary frequencies f64 [k / 2]."""
        return frequencies(self.head_dim, self.rope_theta, dict(self.rope_scaling) if self.rope_scaling else None)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d] -> [..., d]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32)).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, kv: Any, positions: jax.Array, sight: Sight) -> Any:
        """x [b, s, d], kv None or two [b, g, t, k] -> ([b, s, d], as `attended`)."""
        c = self.config
        g, k = c.num_key_value_heads, c.head_dim
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(RMSNorm, c.rms_norm_eps, self.dtype, self.param_dtype)

        def heads(name: str, count: int) -> jax.Array:
            y = dense(count * k, use_bias=c.qkv_bias, name=f"{name}_proj")(x).reshape(*x.shape[:2], count, k)
            if c.qk_norm and name != "v":
                y = norm(name=f"{name}_norm")(y)
            return y if name == "v" else rotate(y, positions, c.frequencies())

        q, keys, values = heads("q", c.num_attention_heads), heads("k", g), heads("v", g)
        out, new = attended(q, keys, values, kv, sight)
        return dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(out.reshape(*x.shape[:2], -1)), new


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, d]."""
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=c.mlp_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        gate, up = (dense(c.intermediate_size, name=f"{name}_proj")(x) for name in ("gate", "up"))
        return dense(c.hidden_size, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer, in the form `nn.scan` wants: (x, cache of the layer, what all layers share) -> (x, new)."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, kv: Any, positions: jax.Array, sight: Sight) -> Any:
        """x [b, s, d] -> ([b, s, d], as `attended`)."""
        x = layer_input(x)
        parts = (self.config, self.dtype, self.param_dtype)
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, self.dtype, self.param_dtype)
        y, kv = Attention(*parts, name="self_attn")(norm(name="input_layernorm")(x), kv, positions, sight)
        x = x + y
        return x + MLP(*parts, name="mlp")(norm(name="post_attention_layernorm")(x)), kv


class Llama(Decoder):
    """The decoder."""

    config: LlamaConfig

    def setup(self) -> None:
        """The parts; parameters are named as on the Hub."""
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        parts = (c, self.dtype, self.param_dtype)
        self.layers = stacked(Block, parts, c.num_hidden_layers, 2, self.scan_layers, self.remat)
        self.norm = RMSNorm(c.rms_norm_eps, **kinds)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, **kinds)

    def head(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] -> logits f32 [..., v]."""
        if self.config.tie_word_embeddings:
            return tied_head(self.embed_tokens, hidden)
        return self.lm_head(hidden).astype(jnp.float32)

    def states(self, tokens: jax.Array, positions: jax.Array, kv: Any, sight: Sight) -> tuple[jax.Array, Any]:
        """As `Decoder.states`."""
        if self.config.sliding_window is not None:
            sight = sight.within(self.config.sliding_window)
        x, new = through(self.layers, self.embed_tokens(tokens), kv, positions, sight)
        return self.norm(x), new


def hf_tensors(config: LlamaConfig, scan_layers: bool = True) -> list[HFTensor]:
    """Every tensor of the Hub's checkpoint and where it lies in the tree."""
    out = [HFTensor("model.embed_tokens.weight", "embed_tokens/embedding"), HFTensor("model.norm.weight", "norm/scale")]
    if not config.tie_word_embeddings:
        out += dense_tensors("lm_head", bias=False)
    biased = {"q": config.qkv_bias, "k": config.qkv_bias, "v": config.qkv_bias, "o": config.o_bias}
    linears = {f"self_attn/{name}_proj": bias for name, bias in biased.items()}
    linears |= {f"mlp/{name}_proj": config.mlp_bias for name in ("gate", "up", "down")}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn/q_norm", "self_attn/k_norm"] if config.qk_norm else []
    one = [tensor for name, bias in linears.items() for tensor in dense_tensors(name, bias=bias)]
    one += [tensor for name in norms for tensor in norm_tensors(name, bias=False)]
    return out + layer_tensors("model.layers", "layers", config.num_hidden_layers, scan_layers, one)
