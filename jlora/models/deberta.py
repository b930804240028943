"""DeBERTa v2 and v3 (He et al. 2020, 2021) in Flax Linen, with the heads of `jlora/models/heads.py`.

Axes as in `jlora/models/disentangled.py`. Module names are the Hub's. There is no dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.bert import AddNorm, Intermediate, embedding_tensors
from jlora.models.disentangled import SelfAttention, relative_index
from jlora.models.heads import HeadedEncoder, head_tensors
from jlora.models.hub import ACTIVATIONS, check_activations, refuse_others, said
from jlora.models.layers import layer_input, stacked, through
from jlora.models.tensors import HFTensor, dense_tensors, layer_tensors, norm_tensors, prefixed


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Sizes and switches, under the Hub's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    max_relative_positions: int = -1
    position_buckets: int = -1
    pos_att_type: tuple[str, ...] = ("p2c", "c2p")
    share_att_key: bool = False
    norm_rel_ebd: bool = False
    position_biased_input: bool = True
    type_vocab_size: int = 0
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    layer_norm_eps: float = 1e-7
    hidden_act: str = "gelu"
    pooler_hidden_act: str = "gelu"
    num_labels: int = 2
    tie_word_embeddings: bool = True
    model_type: str = "deberta-v2"

    @classmethod
    def from_hf(cls, hub: Mapping[str, Any]) -> DebertaConfig:
        """From a `config.json`. Raises ValueError for a field whose value changes results and is not supported."""
        refuse_others(hub, {"relative_attention": True, "talking_head": False, "legacy": True}, "deberta-v2")
        size = hub.get("attention_head_size")
        if size is not None and size != hub["hidden_size"] // hub["num_attention_heads"]:
            raise ValueError(f"attention_head_size {size!r} is not supported: hidden_size / num_attention_heads is")
        if hub.get("embedding_size", hub["hidden_size"]) != hub["hidden_size"]:
            raise ValueError(f"embedding_size {hub['embedding_size']} other than hidden_size is not supported")
        check_activations(hub, "hidden_act", "conv_act", "pooler_hidden_act")
        held = said(cls, hub)
        types = held.get("pos_att_type", ())
        types = types.split("|") if isinstance(types, str) else types
        held["pos_att_type"] = tuple(kind.strip().lower() for kind in types if kind.strip())
        held["norm_rel_ebd"] = "layer_norm" in (hub.get("norm_rel_ebd") or "none")
        held["num_labels"] = len(hub["id2label"]) if hub.get("id2label") else hub.get("num_labels", 2)
        return cls(**held)

    @property
    def furthest(self) -> int:
        """The largest distance told apart."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Relative positions on each side."""
        return self.position_buckets if self.position_buckets > 0 else self.furthest


XXLARGE = DebertaConfig(
    vocab_size=128100,
    hidden_size=1536,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=24,
    position_buckets=256,
    share_att_key=True,
    norm_rel_ebd=True,
    position_biased_input=False,
    conv_kernel_size=3,
    conv_act="gelu",
)
"""microsoft/deberta-v2-xxlarge, 1.5 billion parameters."""


class Attention(nn.Module):
    """Attention and its output projection, added and normalised."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *shared: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, d]."""
        parts: Any = (self.config, self.dtype, self.param_dtype)
        return AddNorm(*parts, name="output")(SelfAttention(*parts, name="self")(x, *shared), x)


class Layer(nn.Module):
    """One layer, in the form `nn.scan` wants. After the first, the convolution of the input is added."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, own: Any, relative: jax.Array, index: jax.Array, allowed: jax.Array, conv: Any
    ) -> tuple[jax.Array, None]:
        """x [b, s, d], own (is it the first, bool [],), conv None or ([b, s, d], scale [d], bias [d]) -> (x, None)."""
        x = layer_input(x)
        parts: Any = (self.config, self.dtype, self.param_dtype)
        x = Attention(*parts, name="attention")(x, relative, index, allowed)
        x = AddNorm(*parts, name="output")(Intermediate(*parts, name="intermediate")(x), x)
        if conv is not None:
            extra, scale, bias = conv
            normed = nn.standardize((x + extra).astype(jnp.float32), epsilon=self.config.layer_norm_eps)
            mixed = (normed * scale + bias) * allowed[..., None]
            x = jnp.where(own[0], mixed.astype(x.dtype), x)
        return x, None


class Scale(nn.Module):
    """The scale and bias of a LayerNorm, to be applied elsewhere."""

    param_dtype: Any

    @nn.compact
    def __call__(self, size: int) -> tuple[jax.Array, jax.Array]:
        """(scale [d], bias [d])."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        return self.param("scale", ones, (size,), self.param_dtype), self.param(
            "bias", zeros, (size,), self.param_dtype
        )


class Convolution(nn.Module):
    """act(conv(x)) along the sequence, for tokens that are real, and the norm that follows its addition."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, allowed: jax.Array) -> Any:
        """x [b, s, d] -> ([b, s, d], scale [d], bias [d])."""
        c = self.config
        pad = (c.conv_kernel_size - 1) // 2
        conv = nn.Conv(
            c.hidden_size,
            (c.conv_kernel_size,),
            padding=[(pad, pad)],
            feature_group_count=c.conv_groups,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )
        y = ACTIVATIONS[c.conv_act](conv(x) * allowed[..., None])
        return y, *Scale(self.param_dtype, name="LayerNorm")(c.hidden_size)


class Encoder(nn.Module):
    """Relative embeddings, layers and the convolution."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any
    scan_layers: bool
    remat: bool | str

    def setup(self) -> None:
        """The parts."""
        c, parts = self.config, (self.config, self.dtype, self.param_dtype)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.rel_embeddings = nn.Embed(2 * c.span, c.hidden_size, **kinds)
        self.layer = stacked(Layer, parts, c.num_hidden_layers, 4, self.scan_layers, self.remat)
        if c.norm_rel_ebd:
            self.LayerNorm = nn.LayerNorm(epsilon=c.layer_norm_eps, **kinds)
        if c.conv_kernel_size:
            self.conv = Convolution(*parts)

    def __call__(self, x: jax.Array, allowed: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, d]."""
        relative = self.rel_embeddings(jnp.arange(2 * self.config.span))
        relative = self.LayerNorm(relative) if self.config.norm_rel_ebd else relative
        conv = self.conv(x, allowed) if self.config.conv_kernel_size else None
        own = (jnp.arange(self.config.num_hidden_layers) == 0,)
        index = jnp.asarray(relative_index(x.shape[1], self.config))
        return through(self.layer, x, own, relative, index, allowed, conv)[0]


class Embeddings(nn.Module):
    """Word embeddings (and, where a model has them, positions and types), normalised; padding is zero."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        """The tables."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.word_embeddings = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        if c.position_biased_input:
            self.position_embeddings = nn.Embed(c.max_position_embeddings, c.hidden_size, **kinds)
        if c.type_vocab_size:
            self.token_type_embeddings = nn.Embed(c.type_vocab_size, c.hidden_size, **kinds)
        self.LayerNorm = nn.LayerNorm(epsilon=c.layer_norm_eps, **kinds)

    def __call__(self, tokens: jax.Array, types: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens, types i32 [b, s], mask bool [b, s] -> [b, s, d]."""
        x = self.word_embeddings(tokens)
        if self.config.position_biased_input:
            x += self.position_embeddings(jnp.arange(tokens.shape[1]))
        if self.config.type_vocab_size:
            x += self.token_type_embeddings(types)
        return self.LayerNorm(x) * mask[..., None]


class Deberta(HeadedEncoder):
    """The encoder under a head."""

    config: DebertaConfig

    def setup(self) -> None:
        """The parts; parameters are named as on the Hub, without the model's prefix."""
        super().setup()
        parts = (self.config, self.dtype, self.param_dtype)
        self.embeddings = Embeddings(*parts)
        self.encoder = Encoder(*parts, self.scan_layers, self.remat)

    def hidden(
        self, tokens: jax.Array, *, mask: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """tokens i32 [b, s] -> [b, s, d]. mask bool [b, s]: True for a real token."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        types = jnp.zeros_like(tokens) if token_type_ids is None else token_type_ids
        return self.encoder(self.embeddings(tokens, types, mask), mask)


def hf_tensors(config: DebertaConfig, scan_layers: bool = True, head: str = "none") -> list[HFTensor]:
    """Every tensor of the Hub's checkpoint that the model under `head` has, and where it lies in the tree."""
    biased, typed = config.position_biased_input, config.type_vocab_size
    out = embedding_tensors("word", *["position"] * bool(biased), *["token_type"] * bool(typed))
    out.append(HFTensor("encoder.rel_embeddings.weight", "encoder/rel_embeddings/embedding"))
    if config.norm_rel_ebd:
        out += norm_tensors("encoder/LayerNorm")
    if config.conv_kernel_size:  # torch's [out, in, width] is Flax's [width, in, out] reversed
        out += dense_tensors("encoder/conv/conv") + norm_tensors("encoder/conv/LayerNorm")
    linears = [f"attention/self/{name}_proj" for name in ("query", "key", "value")]
    linears += ["attention/output/dense", "intermediate/dense", "output/dense"]
    if not config.share_att_key:
        own = {"c2p": "key", "p2c": "query"}
        linears += [f"attention/self/pos_{name}_proj" for kind, name in own.items() if kind in config.pos_att_type]
    norms = ("attention/output/LayerNorm", "output/LayerNorm")
    one = [t for name in linears for t in dense_tensors(name)] + [t for name in norms for t in norm_tensors(name)]
    out += layer_tensors("encoder.layer", "encoder/layer", config.num_hidden_layers, scan_layers, one)
    out = prefixed("" if head == "none" else "deberta.", out)
    if head in ("pooled", "classify", "regress"):
        out += dense_tensors("pooler/dense")
    return out + head_tensors(head, config.model_type)


def unread(config: DebertaConfig, names: Iterable[str]) -> list[str]:
    """What a checkpoint may hold beside: buffers, other heads, leftovers of v3's training."""
    heads = ("cls.", "lm_predictions.", "mask_predictions.", "classifier.", "pooler.")
    ends = ("embeddings.position_ids", "_embeddings._weight")
    ends += () if config.position_biased_input else ("embeddings.position_embeddings.weight",)
    return [n for n in names if n.startswith(heads) or n.endswith(ends)]
