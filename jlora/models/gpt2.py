"""GPT-2, and GPT-3 by its sizes (Brown et al. 2020, table 2.1), in Flax Linen.

Axes: b batch, s sequence, t keys (the cache's length, or s), d model, h heads, k head size, v vocabulary, l layers.
Module names are the Hub's. GPT-2's own kernels are stored (in, out), as Flax's are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.attention import Sight
from jlora.models.causal import Decoder, attended
from jlora.models.heads import tied_head
from jlora.models.hub import check_causal, refuse_others, said
from jlora.models.layers import layer_input, stacked, through
from jlora.models.tensors import HFTensor, dense_tensors, layer_tensors, norm_tensors


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes, under the Hub's names."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int = 50256
    eos_token_id: int = 50256
    model_type: str = "gpt2"

    @classmethod
    def from_hf(cls, hub: Mapping[str, Any]) -> GPT2Config:
        """From a `config.json`. Raises ValueError for a field whose value changes results and is not supported."""
        only = {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        }
        refuse_others(hub, only, "gpt2")
        check_causal(hub)
        return cls(**said(cls, hub))

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `config.json`."""
        return {"architectures": ["GPT2LMHeadModel"], **dataclasses.asdict(self), "activation_function": "gelu_new"}


def gpt3(layers: int, d: int, heads: int) -> GPT2Config:
    """A size of GPT-3: GPT-2's architecture over 2,048 positions (its sparse attention has dense weights)."""
    return GPT2Config(n_positions=2048, n_embd=d, n_layer=layers, n_head=heads)


GPT3 = {
    "125m": gpt3(12, 768, 12),
    "350m": gpt3(24, 1024, 16),
    "760m": gpt3(24, 1536, 16),
    "1.3b": gpt3(24, 2048, 16),
    "2.7b": gpt3(32, 2560, 32),
    "6.7b": gpt3(32, 4096, 32),
    "13b": gpt3(40, 5120, 40),
    "175b": gpt3(96, 12288, 96),
}
"""Table 2.1, except two of its rows that do not divide: 1.3B has 16 heads here (24 there), 13B d = 5120 (5140)."""


class Attention(nn.Module):
    """Multi-head attention with one fused projection."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, kv: Any, sight: Sight) -> Any:
        """x [b, s, d], kv None or two [b, h, t, k] -> ([b, s, d], as `attended`)."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = nn.Dense(3 * c.n_embd, name="c_attn", **kinds)(x)
        q, k, v = (y.reshape(*x.shape[:2], c.n_head, -1) for y in jnp.split(qkv, 3, axis=-1))
        out, new = attended(q, k, v, kv, sight)
        return nn.Dense(c.n_embd, name="c_proj", **kinds)(out.reshape(x.shape)), new


class MLP(nn.Module):
    """c_proj(gelu(c_fc(x)))."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, d]."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inner = nn.Dense(c.n_inner or 4 * c.n_embd, name="c_fc", **kinds)(x)
        return nn.Dense(c.n_embd, name="c_proj", **kinds)(nn.gelu(inner))


class Block(nn.Module):
    """One layer, in the form `nn.scan` wants: (x, cache of the layer, what all layers share) -> (x, new)."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, kv: Any, sight: Sight) -> Any:
        """x [b, s, d] -> ([b, s, d], as `attended`)."""
        x = layer_input(x)
        parts = (self.config, self.dtype, self.param_dtype)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype, "epsilon": self.config.layer_norm_epsilon}
        y, kv = Attention(*parts, name="attn")(nn.LayerNorm(name="ln_1", **kinds)(x), kv, sight)
        x = x + y
        return x + MLP(*parts, name="mlp")(nn.LayerNorm(name="ln_2", **kinds)(x)), kv


class GPT2(Decoder):
    """The decoder; its head is the word embedding, tied."""

    config: GPT2Config

    def setup(self) -> None:
        """The parts; parameters are named as on the Hub, without "transformer."."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.wte = nn.Embed(c.vocab_size, c.n_embd, **kinds)
        self.wpe = nn.Embed(c.n_positions, c.n_embd, **kinds)
        self.h = stacked(Block, (c, self.dtype, self.param_dtype), c.n_layer, 1, self.scan_layers, self.remat)
        self.ln_f = nn.LayerNorm(epsilon=c.layer_norm_epsilon, **kinds)

    def head(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] -> logits f32 [..., v]."""
        return tied_head(self.wte, hidden)

    def key_heads(self) -> tuple[int, int]:
        """As many as heads of queries."""
        return self.config.n_head, self.config.n_embd // self.config.n_head

    def states(self, tokens: jax.Array, positions: jax.Array, kv: Any, sight: Sight) -> tuple[jax.Array, Any]:
        """As `Decoder.states`."""
        x, new = through(self.h, self.wte(tokens) + self.wpe(positions), kv, sight)
        return self.ln_f(x), new


def hf_tensors(config: GPT2Config, scan_layers: bool = True) -> list[HFTensor]:
    """Every tensor of the Hub's checkpoint and where it lies in the tree. No kernel is transposed."""
    out = [HFTensor(f"transformer.{name}.weight", f"{name}/embedding") for name in ("wte", "wpe")]
    out += norm_tensors("ln_f", "transformer.ln_f")
    linears = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    one = [dataclasses.replace(tensor, transpose=False) for name in linears for tensor in dense_tensors(name)]
    one += [*norm_tensors("ln_1"), *norm_tensors("ln_2")]
    return out + layer_tensors("transformer.h", "h", config.n_layer, scan_layers, one)


def unread(config: GPT2Config, names: Iterable[str]) -> list[str]:
    """Buffers of old checkpoints, and the head's copy of the embedding."""
    return [n for n in names if n.endswith((".attn.bias", ".attn.masked_bias")) or n == "lm_head.weight"]
