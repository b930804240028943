"""DeBERTa v2 and v3 (He et al. 2020, 2021) in Flax Linen: disentangled attention over relative positions.

Axes: b batch, s and t positions, d model, h heads, k head size, p relative positions (2 x span), l layers. Module names
are the Hub's. There is no dropout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.bert import ACTIVATIONS, AddNorm, Intermediate, check_activations
from jlora.models.causal import layer_input, refuse_others, stacked, through
from jlora.models.heads import Classifier, MaskedLM, Pooler, check_head, head_tensors
from jlora.models.tensors import HFTensor, dense_tensors, norm_tensors


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
        held: dict[str, Any] = {f.name: hub[f.name] for f in dataclasses.fields(cls) if hub.get(f.name) is not None}
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


def relative_index(length: int, config: DebertaConfig) -> np.ndarray:
    """i32 [s, t]: the row of the relative embeddings for each pair; beyond half the span, buckets grow by logarithm."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    if config.position_buckets > 0:
        mid = config.position_buckets // 2
        far = np.where(np.abs(distance) < mid, mid - 1, np.abs(distance))
        growth = np.log(far.astype(np.float32) / mid) / math.log((config.furthest - 1) / mid)
        bucket = np.ceil(growth.astype(np.float32) * (mid - 1)) + mid
        distance = np.where(far <= mid, distance, bucket * np.sign(distance)).astype(np.int64)
    return np.clip(distance + config.span, 0, 2 * config.span - 1).astype(np.int32)


class SelfAttention(nn.Module):
    """Content to content, content to position and position to content."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, relative: jax.Array, index: jax.Array, allowed: jax.Array) -> jax.Array:
        """x [b, s, d], relative [p, d], index i32 [s, t], allowed bool [b, t] -> [b, s, d]."""
        c = self.config
        dense = functools.partial(nn.Dense, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        split = lambda y: y.reshape(*y.shape[:-1], c.num_attention_heads, -1)
        project = {name: dense(name=f"{name}_proj") for name in ("query", "key", "value")}
        q, k, v = (split(layer(x)) for layer in project.values())
        terms = 1 + len({"c2p", "p2c"} & {*c.pos_att_type})
        scale = (q.shape[-1] * terms) ** -0.5
        scores = jnp.einsum("bshk,bthk->bhst", q, k)

        def places(name: str) -> jax.Array:
            own = project[name] if c.share_att_key else dense(name=f"pos_{name}_proj")
            return split(own(relative))

        if "c2p" in c.pos_att_type:
            by_place = jnp.einsum("bshk,phk->bhsp", q, places("key"))
            scores += jnp.take_along_axis(by_place, index[None, None], axis=-1)
        if "p2c" in c.pos_att_type:
            by_place = jnp.einsum("bthk,phk->bhpt", k, places("query"))
            scores += jnp.take_along_axis(by_place, index[None, None], axis=-2)
        scores = jnp.where(allowed[:, None, None], scores.astype(jnp.float32) * scale, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return jnp.einsum("bhst,bthk->bshk", weights, v).reshape(x.shape)


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


class Deberta(nn.Module):
    """The encoder under one of the heads "none", "pooled", "classify", "regress", "mlm". `remat`: as in `stacked`."""

    config: DebertaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: bool | str = False
    head: str = "none"

    def setup(self) -> None:
        """The parts; parameters are named as on the Hub, without the model's prefix."""
        check_head(self.head, self.config.tie_word_embeddings)
        parts = (self.config, self.dtype, self.param_dtype)
        self.embeddings = Embeddings(*parts)
        self.encoder = Encoder(*parts, self.scan_layers, self.remat)
        if self.head not in ("none", "mlm"):
            self.pooler = Pooler(*parts, ACTIVATIONS[self.config.pooler_hidden_act])
        if self.head in ("classify", "regress"):
            self.classifier = Classifier(*parts)
        if self.head == "mlm":
            self.lm_head = MaskedLM(*parts, ACTIVATIONS[self.config.hidden_act])

    def hidden(
        self, tokens: jax.Array, *, mask: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """tokens i32 [b, s] -> [b, s, d]. mask bool [b, s]: True for a real token."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        types = jnp.zeros_like(tokens) if token_type_ids is None else token_type_ids
        return self.encoder(self.embeddings(tokens, types, mask), mask)

    def __call__(self, tokens: jax.Array, **options: Any) -> jax.Array:
        """tokens i32 [b, s] -> hidden states [b, s, d], pooled [b, d], logits f32 [b, c] or f32 [b, s, v], by head."""
        hidden = self.hidden(tokens, **options)
        if self.head == "none":
            return hidden
        if self.head == "mlm":
            return self.lm_head(hidden, self.embeddings.word_embeddings)
        pooled = self.pooler(hidden)
        return pooled if self.head == "pooled" else self.classifier(pooled).astype(jnp.float32)


def hf_tensors(config: DebertaConfig, scan_layers: bool = True, head: str = "none") -> list[HFTensor]:
    """Every tensor of the Hub's checkpoint that the model under `head` has, and where it lies in the tree."""
    prefix = "" if head == "none" else "deberta."
    tables = ["word", *(["position"] if config.position_biased_input else [])]
    tables += ["token_type"] if config.type_vocab_size else []
    out = [
        HFTensor(f"{prefix}embeddings.{n}_embeddings.weight", f"embeddings/{n}_embeddings/embedding") for n in tables
    ]
    out += norm_tensors(f"{prefix}embeddings.LayerNorm", "embeddings/LayerNorm")
    out.append(HFTensor(f"{prefix}encoder.rel_embeddings.weight", "encoder/rel_embeddings/embedding"))
    if config.norm_rel_ebd:
        out += norm_tensors(f"{prefix}encoder.LayerNorm", "encoder/LayerNorm")
    if config.conv_kernel_size:  # torch's [out, in, width] is Flax's [width, in, out] reversed
        out += dense_tensors(f"{prefix}encoder.conv.conv", "encoder/conv/conv")
        out += norm_tensors(f"{prefix}encoder.conv.LayerNorm", "encoder/conv/LayerNorm")
    linears = [f"attention/self/{n}_proj" for n in ("query", "key", "value")]
    linears += ["attention/output/dense", "intermediate/dense", "output/dense"]
    own = {"c2p": "key", "p2c": "query"} if not config.share_att_key else {}
    for n in range(config.num_hidden_layers):
        where, layer = ("encoder/layer", n) if scan_layers else (f"encoder/layer_{n}", None)
        hub = f"{prefix}encoder.layer.{n}."
        for name in linears:
            out += dense_tensors(hub + name.replace("/", "."), f"{where}/{name}", layer)
        for kind, name in own.items():
            if kind in config.pos_att_type:
                at = f"attention/self/pos_{name}_proj"
                out += dense_tensors(hub + at.replace("/", "."), f"{where}/{at}", layer)
        for name in ("attention/output/LayerNorm", "output/LayerNorm"):
            out += norm_tensors(hub + name.replace("/", "."), f"{where}/{name}", layer)
    if head in ("pooled", "classify", "regress"):
        out += dense_tensors("pooler.dense", "pooler/dense")
    return out + head_tensors(head, config.model_type)


def unread(config: DebertaConfig, names: Iterable[str]) -> list[str]:
    """What a checkpoint may hold beside: buffers, other heads, leftovers of v3's training."""
    heads = ("cls.", "lm_predictions.", "mask_predictions.", "classifier.", "pooler.")
    ends = ("embeddings.position_ids", "_embeddings._weight")
    ends += () if config.position_biased_input else ("embeddings.position_embeddings.weight",)
    return [n for n in names if n.startswith(heads) or n.endswith(ends)]
