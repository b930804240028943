"""Entries that stand at a module, in trees of every kind: IA3's vector for weight and bias, adapters, prefixes."""

from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.methods import adapter, ia3, prefix
from jlora.methods.plant import entries_of

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (5, 6))
DRAW = jax.random.normal(KEY, (2, 6, 6))


class Dense(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def haiku():
    f = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 6])(x)))
    params = jax.tree.map(lambda x: x + 0.1, f.init(KEY, X))
    return f.apply, params, "mlp/~/linear_1", {"w": "io"}


def equinox():
    params, rest = eqx.partition(eqx.nn.MLP(6, 6, 12, 2, key=KEY), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, rest))(x), params, "layers/1", {"weight": "oi"}


def named_tuples():
    params = [Dense(w, w[0]) for w in DRAW]
    return lambda p, x: jnp.tanh(x @ p[0].kernel + p[0].bias) @ p[1].kernel + p[1].bias, params, "1", None


def alone():
    return lambda p, x: x @ p["kernel"] + p["bias"], {"kernel": DRAW[0], "bias": DRAW[1, 0]}, "", None


def of_nnx():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(6, 12, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.gelu(self.up(x)))

    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x + 0.1, state)
    return lambda p, x: nnx.merge(graph, p)(x), state, "up", None


def boxed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", None))
    model = nn.Sequential([nn.Dense(12, kernel_init=init, bias_init=nn.initializers.ones), nn.relu, nn.Dense(6)])
    return lambda p, x: model.apply({"params": p}, x), model.init(KEY, X)["params"], "layers_0", None


def linen():
    model = nn.Sequential([nn.Dense(12, bias_init=nn.initializers.ones), nn.relu, nn.Dense(6)])
    return lambda p, x: model.apply({"params": p}, x), model.init(KEY, X)["params"], "layers_0", None


MODELS = {
    "haiku": haiku,
    "equinox": equinox,
    "named tuples": named_tuples,
    "alone": alone,
    "linen": linen,
    "nnx": of_nnx,
    "boxed": boxed,
}


def under(path, module):
    return path.startswith(f"{module}/") if module else True


def scaled(params, module, by):
    """The weights of a module (and no other) times `by`: (x·W + b) * l of equal l."""
    at = lambda keys, x: x * by if under(jax.tree_util.keystr(keys, simple=True, separator="/"), module) else x
    return jax.tree_util.tree_map_with_path(at, params)


@pytest.mark.parametrize("name", MODELS)
def test_ia3_scales_a_module_of_any_tree_with_its_bias(name):
    f, params, module, layouts = MODELS[name]()
    chosen = lambda path, leaf: under(path, module) and leaf.ndim == 2
    frozen, trained = ia3.make(params, targets=chosen, feedforward=(), layouts=layouts)
    assert list(entries_of(trained)) == [module]
    apply = jlora.lift(f, strict=True)
    np.testing.assert_array_equal(apply(jlora.combine(frozen, trained), X), f(params, X))
    trained = jax.tree.map(lambda x: x * 1.5, trained)
    want = f(scaled(params, module, 1.5), X)
    np.testing.assert_allclose(apply(jlora.combine(frozen, trained), X), want, atol=1e-5)
    merged = jlora.merge(frozen, trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(f(merged, X), want, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_reads_the_bias_of_a_module_of_any_tree(name):
    f, params, module, layouts = MODELS[name]()
    chosen = lambda path, leaf: under(path, module) and leaf.ndim == 2
    frozen, trained = adapter.make(params, 3, points=chosen, layouts=layouts)
    assert list(entries_of(trained)) == [module]
    apply = jlora.lift(f, strict=True)
    np.testing.assert_array_equal(apply(jlora.combine(frozen, trained), X), f(params, X))


def test_a_prefix_stands_in_a_list_and_at_the_root():
    w = {"k_proj": {"kernel": DRAW[0]}, "v_proj": {"kernel": DRAW[1]}}
    for params, module in (([w], "0"), (w, "")):
        frozen, trained = prefix.layer(params, 2)
        assert list(entries_of(trained)) == [module]
        leaves = jax.tree.leaves(jlora.combine(frozen, trained), is_leaf=jlora.leaves.is_implicit)
        assert [type(leaf) for leaf in leaves] == [prefix.PrefixLeaf] * 2
        assert [leaf.path for leaf in leaves] == [f"{module}/{name}/kernel".lstrip("/") for name in w]


def test_flat_names_are_refused_with_the_whole_path():
    flat = {"block/q_proj/kernel": DRAW[0], "block/q_proj/bias": DRAW[1, 0]}
    with pytest.raises(ValueError, match=r"^block/q_proj: one entry for several weights .* nest it by module$"):
        ia3.make(flat, targets="q_proj", feedforward=())
