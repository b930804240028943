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

from jlora.models.causal import layer_input, refuse_others, stacked, through
from jlora.models.heads import Classifier, MaskedLM, Pooler, check_head, head_tensors
from jlora.models.tensors import HFTensor, dense_tensors, norm_tensors

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


def check_activations(hub: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError where a field of a `config.json` names an activation that is not in `ACTIVATIONS`."""
    for name in names:
        if hub.get(name) not in (None, *ACTIVATIONS):
            raise ValueError(f"{name} {hub[name]!r} is not supported: {', '.join(ACTIVATIONS)} are")


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
        held: dict[str, Any] = {f.name: hub[f.name] for f in dataclasses.fields(cls) if hub.get(f.name) is not None}
        held["num_labels"] = len(hub["id2label"]) if hub.get("id2label") else hub.get("num_labels", 2)
        held.setdefault("pad_token_id", 1 if hub.get("model_type") == "roberta" else 0)
        return cls(**held)


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


class Bert(nn.Module):
    """The encoder under one of the heads "none" (hidden states), "pooled", "classify", "regress", "mlm". `remat`: as in
    `stacked`."""

    config: BertConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: bool | str = False
    head: str = "none"

    def setup(self) -> None:
        """The parts; parameters are named as on the Hub, without the model's prefix."""
        parts = (self.config, self.dtype, self.param_dtype)
        check_head(self.head, self.config.tie_word_embeddings)
        self.embeddings = Embeddings(*parts)
        self.encoder = Encoder(*parts, self.scan_layers, self.remat)
        roberta = self.config.model_type == "roberta"
        judged = self.head in ("classify", "regress")
        if self.head == "pooled" or (judged and not roberta):
            self.pooler = Pooler(*parts)
        if judged:
            self.classifier = Classifier(self.config, self.dtype, self.param_dtype, deep=roberta)
        if self.head == "mlm":
            self.lm_head = MaskedLM(*parts, ACTIVATIONS["gelu" if roberta else self.config.hidden_act])

    def hidden(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """tokens i32 [b, s] -> [b, s, d]. mask bool [b, s]: True for a real token.

        positions i32 [b, s]: 0, 1, ... if not given; in RoBERTa counted over tokens that are not padding, from
        pad_token_id + 1.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        if positions is None and self.config.model_type == "roberta":
            pad = self.config.pad_token_id
            real = (tokens != pad).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + pad
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        types = jnp.zeros_like(tokens) if token_type_ids is None else token_type_ids
        return self.encoder(self.embeddings(tokens, positions, types), mask)

    def __call__(self, tokens: jax.Array, **options: Any) -> jax.Array:
        """tokens i32 [b, s] -> hidden states [b, s, d], pooled [b, d], logits f32 [b, c] or f32 [b, s, v], by head."""
        hidden = self.hidden(tokens, **options)
        if self.head == "none":
            return hidden
        if self.head == "mlm":
            return self.lm_head(hidden, self.embeddings.word_embeddings)
        if self.head == "pooled":
            return self.pooler(hidden)
        first = hidden[:, 0] if self.config.model_type == "roberta" else self.pooler(hidden)
        return self.classifier(first).astype(jnp.float32)


def hf_tensors(config: BertConfig, scan_layers: bool = True, head: str = "none") -> list[HFTensor]:
    """Every tensor of the Hub's checkpoint that the model under `head` has, and where it lies in the tree."""
    prefix = "" if head in ("none", "pooled") else f"{config.model_type}."
    out = [
        HFTensor(f"{prefix}embeddings.{name}_embeddings.weight", f"embeddings/{name}_embeddings/embedding")
        for name in ("word", "position", "token_type")
    ]
    out += norm_tensors(f"{prefix}embeddings.LayerNorm", "embeddings/LayerNorm")
    linears = [f"attention/self/{n}" for n in ("query", "key", "value")]
    linears += ["attention/output/dense", "intermediate/dense", "output/dense"]
    for n in range(config.num_hidden_layers):
        where, layer = ("encoder/layer", n) if scan_layers else (f"encoder/layer_{n}", None)
        hub = f"{prefix}encoder.layer.{n}."
        for name in linears:
            out += dense_tensors(hub + name.replace("/", "."), f"{where}/{name}", layer)
        for name in ("attention/output/LayerNorm", "output/LayerNorm"):
            out += norm_tensors(hub + name.replace("/", "."), f"{where}/{name}", layer)
    if head == "pooled" or (head in ("classify", "regress") and config.model_type == "bert"):
        out += dense_tensors(f"{prefix}pooler.dense", "pooler/dense")
    return out + head_tensors(head, config.model_type)


def unread(config: BertConfig, names: Iterable[str]) -> list[str]:
    """What a checkpoint may hold beside: buffers, other heads, a pooler that the head does not use."""
    heads = ("cls.", "lm_head.", "classifier.", "pooler.", f"{config.model_type}.pooler.")
    return [n for n in names if n.startswith(heads) or n.endswith("embeddings.position_ids")]
