"""Heads of encoders: pooler, classification, regression, masked language model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.causal import tied_head
from jlora.models.tensors import HFTensor, dense_tensors, norm_tensors

HEADS = ("none", "pooled", "classify", "regress", "mlm")


def check_head(head: str, tied: bool) -> None:
    """Raises ValueError for an unknown head, and for a masked model's with a table of its own (`tied` False)."""
    if head not in HEADS:
        raise ValueError(f"head {head!r} is not known: {', '.join(HEADS)} are")
    if head == "mlm" and not tied:
        raise ValueError("tie_word_embeddings False is not supported under head 'mlm': True is")


class Pooler(nn.Module):
    """tanh(dense(first token)), or another activation (DeBERTa: gelu)."""

    config: Any
    dtype: Any
    param_dtype: Any
    activation: Any = jnp.tanh

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [b, s, d] -> [b, d]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return self.activation(nn.Dense(self.config.hidden_size, name="dense", **kinds)(hidden[:, 0]))


class Classifier(nn.Module):
    """Logits of c = `num_labels` classes (one is a regression); `deep`: RoBERTa's, with a tanh layer before."""

    config: Any
    dtype: Any
    param_dtype: Any
    deep: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, d] -> [b, c]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if not self.deep:
            kernel = nn.initializers.lecun_normal()
            shape = (x.shape[-1], self.config.num_labels)
            w = self.param("kernel", kernel, shape, self.param_dtype)
            b = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
            return x.astype(self.dtype) @ w.astype(self.dtype) + b.astype(self.dtype)
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


def head_tensors(head: str, model_type: str) -> list[HFTensor]:
    """The Hub's tensors of a head, after the encoder's."""
    if head in ("classify", "regress"):
        parts = ["classifier/dense", "classifier/out_proj"] if model_type == "roberta" else ["classifier"]
        return [t for part in parts for t in dense_tensors(part.replace("/", "."), part)]
    if head != "mlm":
        return []
    if model_type == "roberta":
        dense, norm, bias = "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"
    else:
        start = "cls.predictions"
        dense, norm, bias = f"{start}.transform.dense", f"{start}.transform.LayerNorm", f"{start}.bias"
    tensors = [*dense_tensors(dense, "lm_head/dense"), *norm_tensors(norm, "lm_head/layer_norm")]
    return [*tensors, HFTensor(bias, "lm_head/bias")]
