"""Heads: the embedding turned round, and of encoders pooler, classification, regression, masked language model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jlora.models.hub import ACTIVATIONS
from jlora.models.tensors import HFTensor, dense_tensors, norm_tensors

HEADS = ("none", "pooled", "classify", "regress", "mlm")


class HeadedEncoder(nn.Module):
    """An encoder under a head: "none" (hidden states), "pooled", "classify", "regress" or "mlm"; its family gives
    `embeddings`, in `setup`, and `hidden`. `remat`: as in `layers.stacked`."""

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: bool | str = False
    head: str = "none"

    def setup(self) -> None:
        """The head. Raises ValueError for an unknown one, and for a masked model's with a table of its own."""
        c, parts = self.config, (self.config, self.dtype, self.param_dtype)
        roberta, judges = c.model_type == "roberta", self.head in ("classify", "regress")
        if self.head not in HEADS:
            raise ValueError(f"head {self.head!r} is not known: {', '.join(HEADS)} are")
        if self.head == "mlm" and not c.tie_word_embeddings:
            raise ValueError("tie_word_embeddings False is not supported under head 'mlm': True is")
        if self.head == "pooled" or (judges and not roberta):
            self.pooler = Pooler(*parts, ACTIVATIONS[c.pooler_hidden_act])
        if judges and roberta:
            self.classifier = Classifier(*parts)
        elif judges:
            self.classifier = nn.Dense(c.num_labels, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.head == "mlm":
            self.lm_head = MaskedLM(*parts, ACTIVATIONS["gelu" if roberta else c.hidden_act])

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


class Pooler(nn.Module):
    """activation(dense(first token)): tanh, in DeBERTa gelu."""

    config: Any
    dtype: Any
    param_dtype: Any
    activation: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [b, s, d] -> [b, d]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return self.activation(nn.Dense(self.config.hidden_size, name="dense", **kinds)(hidden[:, 0]))


class Classifier(nn.Module):
    """RoBERTa's logits of c = `num_labels` classes (one is a regression): out_proj(tanh(dense(x)))."""

    config: Any
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, d] -> [b, c]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = jnp.tanh(nn.Dense(self.config.hidden_size, name="dense", **kinds)(x))
        return nn.Dense(self.config.num_labels, name="out_proj", **kinds)(x)


class MaskedLM(nn.Module):
    """LayerNorm(activation(dense(x))) against the word embeddings, plus a bias."""

    config: Any
    dtype: Any
    param_dtype: Any
    activation: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, embeddings: nn.Embed) -> jax.Array:
        """hidden [b, s, d] -> logits f32 [b, s, v]."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = self.activation(nn.Dense(c.hidden_size, name="dense", **kinds)(hidden))
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, name="layer_norm", **kinds)(x)
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), self.param_dtype)
        return tied_head(embeddings, x) + bias


def tied_head(words: nn.Embed, hidden: jax.Array) -> jax.Array:
    """hidden [..., d] -> logits f32 [..., v], the head that shares the embedding of the tokens [v, d].

    `words.attend` turns the embedding round, which XLA for CPUs does by a copy of it where a loop is around the head.
    """
    hidden, table = promote_dtype(hidden, words.embedding, dtype=words.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table).astype(jnp.float32)


def head_tensors(head: str, model_type: str) -> list[HFTensor]:
    """The Hub's tensors of a head, after the encoder's."""
    if head in ("classify", "regress"):
        parts = ["classifier/dense", "classifier/out_proj"] if model_type == "roberta" else ["classifier"]
        return [tensor for part in parts for tensor in dense_tensors(part)]
    if head != "mlm":
        return []
    if model_type == "roberta":
        dense, norm, bias = "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"
    else:
        start = "cls.predictions"
        dense, norm, bias = f"{start}.transform.dense", f"{start}.transform.LayerNorm", f"{start}.bias"
    tensors = dense_tensors("lm_head/dense", dense) + norm_tensors("lm_head/layer_norm", norm)
    return [*tensors, HFTensor(bias, "lm_head/bias")]
