"""The BERT family of encoders: BERT, MiniLM and RoBERTa, in Flax Linen, with the heads of `jlora/models/heads.py`.

Axes: b batch, s sequence, d model, f feed-forward, h heads, k head size, v vocabulary, l layers, c classes. Module
names are the Hub's. There is no dropout: a frozen encoder under adapters is run as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.heads import HeadedEncoder, head_tensors
from jlora.models.hub import ACTIVATIONS, check_activations, refuse_others, said
from jlora.models.layers import layer_input, stacked, through
from jlora.models.tensors import HFTensor, dense_tensors, dotted, layer_tensors, norm_tensors, prefixed


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and switches, under the Hub's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int = 0
    num_labels: int = 2
    tie_word_embeddings: bool = True
    model_type: str = "bert"

    @classmethod
    def from_hf(cls, hub: Mapping[str, Any]) -> BertConfig:
        """From a `config.json`. Raises ValueError for a field whose value changes results and is not supported."""
        only = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
        refuse_others(hub, only, str(hub.get("model_type", "bert")))
        check_activations(hub, "hidden_act")
        held = said(cls, hub)
        held["num_labels"] = len(hub["id2label"]) if hub.get("id2label") else hub.get("num_labels", 2)
        held.setdefault("pad_token_id", 1 if hub.get("model_type") == "roberta" else 0)
        return cls(**held)

    @property
    def pooler_hidden_act(self) -> str:
        return "tanh"


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        """The three tables and the norm."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.word_embeddings = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        self.position_embeddings = nn.Embed(c.max_position_embeddings, c.hidden_size, **kinds)
        self.token_type_embeddings = nn.Embed(c.type_vocab_size, c.hidden_size, **kinds)
        self.LayerNorm = nn.LayerNorm(epsilon=c.layer_norm_eps, **kinds)

    def __call__(self, tokens: jax.Array, positions: jax.Array, types: jax.Array) -> jax.Array:
        """tokens, positions, types i32 [b, s] -> [b, s, d]."""
        x = self.word_embeddings(tokens) + self.position_embeddings(positions) + self.token_type_embeddings(types)
        return self.LayerNorm(x)


class SelfAttention(nn.Module):
    """Bidirectional attention."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, allowed: jax.Array) -> jax.Array:
        """x [b, s, d], allowed bool [b, t] -> [b, s, d]."""
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        dense = functools.partial(nn.Dense, x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype)
        q, k, v = (dense(name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        scores = jnp.einsum("bshk,bthk->bhst", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return jnp.einsum("bhst,bthk->bshk", weights, v).reshape(x.shape)


class Attention(nn.Module):
    """Attention and its output projection, added and normalised."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, allowed: jax.Array) -> jax.Array:
        """x [b, s, d], allowed bool [b, t] -> [b, s, d]."""
        parts = (self.config, self.dtype, self.param_dtype)
        return AddNorm(*parts, name="output")(SelfAttention(*parts, name="self")(x, allowed), x)


class AddNorm(nn.Module):
    """LayerNorm(dense(y) + x)."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """y [b, s, ...], x [b, s, d] -> [b, s, d]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.Dense(self.config.hidden_size, name="dense", **kinds)(y)
        return nn.LayerNorm(epsilon=self.config.layer_norm_eps, name="LayerNorm", **kinds)(x + y)


class Intermediate(nn.Module):
    """act(dense(x))."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, f]."""
        dense = nn.Dense(self.config.intermediate_size, name="dense", dtype=self.dtype, param_dtype=self.param_dtype)
        return ACTIVATIONS[self.config.hidden_act](dense(x))


class Layer(nn.Module):
    """One layer, in the form `nn.scan` wants: (x, None, what all layers share) -> (x, None)."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, own: None, allowed: jax.Array) -> tuple[jax.Array, None]:
        """x [b, s, d] -> [b, s, d]."""
        x = layer_input(x)
        parts = (self.config, self.dtype, self.param_dtype)
        x = Attention(*parts, name="attention")(x, allowed)
        return AddNorm(*parts, name="output")(Intermediate(*parts, name="intermediate")(x), x), own


class Encoder(nn.Module):
    """The layers, scanned over a stack or one by one."""

    config: BertConfig
    dtype: Any
    param_dtype: Any
    scan_layers: bool
    remat: bool | str

    def setup(self) -> None:
        """The layers."""
        c, parts = self.config, (self.config, self.dtype, self.param_dtype)
        self.layer = stacked(Layer, parts, c.num_hidden_layers, 1, self.scan_layers, self.remat)

    def __call__(self, x: jax.Array, allowed: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, d]."""
        return through(self.layer, x, None, allowed)[0]


class Bert(HeadedEncoder):
    """The encoder under a head."""

    config: BertConfig

    def setup(self) -> None:
        """The parts; parameters are named as on the Hub, without the model's prefix."""
        super().setup()
        parts = (self.config, self.dtype, self.param_dtype)
        self.embeddings = Embeddings(*parts)
        self.encoder = Encoder(*parts, self.scan_layers, self.remat)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """tokens i32 [b, s] -> [b, s, d]. mask bool [b, s]: True for a real token.

        positions i32 [b, s]: 0, 1, ... if not given, and 0 of padding; in RoBERTa counted over tokens that are not
        padding, from pad_token_id + 1.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        if positions is None and self.config.model_type == "roberta":
            pad = self.config.pad_token_id
            real = (tokens != pad).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + pad
        elif positions is None:
            # padding may go past the table, whose rows there are NaN
            positions = jnp.where(mask, jnp.arange(tokens.shape[1])[None], 0)
        types = jnp.zeros_like(tokens) if token_type_ids is None else token_type_ids
        return self.encoder(self.embeddings(tokens, positions, types), mask)


def hf_tensors(config: BertConfig, scan_layers: bool = True, head: str = "none") -> list[HFTensor]:
    """Every tensor of the Hub's checkpoint that the model under `head` has, and where it lies in the tree."""
    out = embedding_tensors("word", "position", "token_type")
    linears = [f"attention/self/{name}" for name in ("query", "key", "value")]
    linears += ["attention/output/dense", "intermediate/dense", "output/dense"]
    norms = ("attention/output/LayerNorm", "output/LayerNorm")
    one = [t for name in linears for t in dense_tensors(name)] + [t for name in norms for t in norm_tensors(name)]
    out += layer_tensors("encoder.layer", "encoder/layer", config.num_hidden_layers, scan_layers, one)
    if head == "pooled" or (head in ("classify", "regress") and config.model_type == "bert"):
        out += dense_tensors("pooler/dense")
    prefix = "" if head in ("none", "pooled") else f"{config.model_type}."
    return prefixed(prefix, out) + head_tensors(head, config.model_type)


def embedding_tensors(*names: str) -> list[HFTensor]:
    """The tables of an encoder's embeddings, and the norm after them."""
    tables = [f"embeddings/{name}_embeddings" for name in names]
    return [*(HFTensor(f"{dotted(t)}.weight", f"{t}/embedding") for t in tables), *norm_tensors("embeddings/LayerNorm")]


def unread(config: BertConfig, names: Iterable[str]) -> list[str]:
    """What a checkpoint may hold beside: buffers, other heads, a pooler that the head does not use."""
    heads = ("cls.", "lm_head.", "classifier.", "pooler.", f"{config.model_type}.pooler.")
    return [n for n in names if n.startswith(heads) or n.endswith("embeddings.position_ids")]
