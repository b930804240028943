"""A transformer as in "Attention Is All You Need" (Vaswani et al. 2017), written to be read.

An encoder and a decoder, every product spelt out with einsum, weights in whatever shape is most natural to write. It
knows nothing of adapters and nothing of the rest of this library: the tests take it for somebody else's model.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Each head has its own slice of every weight: [d, h, k] in, [h, k, d] out."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array, allowed: jax.Array) -> jax.Array:
        """x [b, s, d] asks, memory [b, t, d] answers; allowed bool, broadcast to [b, h, s, t] -> [b, s, d]."""
        d = x.shape[-1]
        k = d // self.heads
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        back = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        queries = jnp.einsum("bsd,dhk->bhsk", x, self.param("query", init, (d, self.heads, k)))
        keys = jnp.einsum("btd,dhk->bhtk", memory, self.param("key", init, (d, self.heads, k)))
        values = jnp.einsum("btd,dhk->bhtk", memory, self.param("value", init, (d, self.heads, k)))
        scores = jnp.einsum("bhsk,bhtk->bhst", queries, keys) / jnp.sqrt(k)
        weights = jax.nn.softmax(jnp.where(allowed, scores, -1e9), axis=-1)
        mixed = jnp.einsum("bhst,bhtk->bhsk", weights, values)
        return jnp.einsum("bhsk,hkd->bsd", mixed, self.param("out", back, (self.heads, k, d)))


class FeedForward(nn.Module):
    """Two linear maps with a relu between."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, s, d]."""
        return nn.Dense(x.shape[-1])(nn.relu(nn.Dense(self.hidden)(x)))


class EncoderLayer(nn.Module):
    """Attention, then feed-forward; each is added to its input and normalised."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """x [b, s, d], real bool [b, s] -> [b, s, d]."""
        x = nn.LayerNorm()(x + Attention(self.heads)(x, x, real[:, None, None]))
        return nn.LayerNorm()(x + FeedForward(self.hidden)(x))


class DecoderLayer(nn.Module):
    """Attention to what is written so far, attention to the source, feed-forward."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, y: jax.Array, source: jax.Array, real: jax.Array) -> jax.Array:
        """y [b, t, d], source [b, s, d], real bool [b, s] -> [b, t, d]."""
        past = jnp.tril(jnp.ones((y.shape[1], y.shape[1]), bool))
        y = nn.LayerNorm()(y + Attention(self.heads, name="own")(y, y, past))
        y = nn.LayerNorm()(y + Attention(self.heads, name="cross")(y, source, real[:, None, None]))
        return nn.LayerNorm()(y + FeedForward(self.hidden)(y))


def sinusoids(length: int, d: int) -> jax.Array:
    """Positions as sines and cosines of falling frequencies, f32 [length, d] (section 3.5)."""
    angles = jnp.arange(length)[:, None] / 10000 ** (jnp.arange(0, d, 2) / d)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, d)


class Transformer(nn.Module):
    """Tokens of a source and of a target so far to logits of the next target token; one table embeds and decodes."""

    vocabulary: int
    d: int = 64
    heads: int = 4
    hidden: int = 128
    layers: int = 2

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """source i32 [b, s] and target i32 [b, t], 0 for padding -> logits f32 [b, t, v]."""
        table = self.param("table", nn.initializers.normal(self.d**-0.5), (self.vocabulary, self.d))
        embed = lambda tokens: table[tokens] * jnp.sqrt(self.d) + sinusoids(tokens.shape[1], self.d)
        real = source != 0
        x, y = embed(source), embed(target)
        for _ in range(self.layers):
            x = EncoderLayer(self.heads, self.hidden)(x, real)
        for _ in range(self.layers):
            y = DecoderLayer(self.heads, self.hidden)(y, x, real)
        return y @ table.T
