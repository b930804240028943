"""Small models for the tests of methods: an encoder with biases under the Hub's names, and a tiny Llama."""

import functools
import re
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

import jlora
from jlora.models.llama import Llama, LlamaConfig

KEY = jax.random.key(3)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 31)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(8, name=name)(x) for name in ("query", "key", "value"))
        return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / 8**0.5) @ v


class Output(nn.Module):
    @nn.compact
    def __call__(self, x, residual):
        return nn.LayerNorm(name="LayerNorm")(nn.Dense(residual.shape[-1], name="dense")(x) + residual)


class AttentionBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Output(name="output")(Attention(name="self")(x), x)


class Intermediate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.gelu(nn.Dense(12, name="dense")(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = AttentionBlock(name="attention")(x)
        return Output(name="output")(Intermediate(name="intermediate")(x), x), None


class Encoder(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(31, 8, name="embed_tokens")(tokens)
        if self.scan:
            stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="layers")(x, None)
        else:
            for n in range(3):
                x, _ = Layer(name=f"layers_{n}")(x)
        return nn.Dense(5, name="classifier")(x)


def jitter(tree, size=0.3):
    """`tree` with every array moved, each by its own draw."""
    leaves, treedef = jax.tree.flatten(tree)
    moved = [
        x + (size * jax.random.normal(jax.random.fold_in(KEY, n), x.shape)).astype(x.dtype)
        for n, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, moved)


def encoder(scan=True, dtype=jnp.float32):
    """(apply, params): biases and norms are not at their usual zeros and ones."""
    model = Encoder(scan)
    params = jitter(model.init(KEY, TOKENS)["params"], 0.1)
    return (lambda p, t: model.apply({"params": p}, t)), jax.tree.map(lambda x: x.astype(dtype), params)


CONFIG = LlamaConfig(31, 16, 24, 3, 4, 2, 4, tie_word_embeddings=True)


def llama(scan=True, dtype=jnp.float32):
    """(apply, params) of a tiny Llama."""
    model = Llama(CONFIG, scan_layers=scan)
    params = model.init(KEY, TOKENS)["params"]
    return (lambda p, t: model.apply({"params": p}, t)), jax.tree.map(lambda x: x.astype(dtype), params)


def apply_of(params):
    """The function of these parameters, for methods that watch it."""
    scan = "layers" in params
    return (encoder if "classifier" in params else llama)(scan)[0]


def stacks(params):
    """The layouts of a scanned model's kernels."""
    leaves = jlora.tree.paths(params)
    return {path: "sio" for path, x in leaves.items() if path.endswith("kernel") and x.ndim == 3}


@functools.cache
def page(name):
    """The Python blocks of docs/NAME.md as one module."""
    text = (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text(encoding="utf-8")
    code = "\n\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    module = types.ModuleType(name.replace("-", "_"))
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, f"docs/{name}.md", "exec"), module.__dict__)
    return module
