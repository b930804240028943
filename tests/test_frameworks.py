"""The same ten lines on a model of each library, unmodified: train, freeze, merge, with nothing materialised."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from jlora.bank import AdapterBank
from jlora.methods import bitfit, eva, full, intrinsic
from jlora.methods.plant import entries_of
from jlora.sharding import like, make_mesh, place, specs
from jlora.tree import paths, size

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 6))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(6)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


def linen(model):
    return lambda p, x: model.apply({"params": p}, x), model.init(KEY, X)["params"]


def from_nnx():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(6, 12, rngs=rngs)
            self.down = nnx.Linear(12, 6, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.gelu(self.up(x)))

    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), state


def from_equinox():
    arrays, rest = eqx.partition(eqx.nn.MLP(6, 6, 12, 2, key=KEY), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, rest))(x), arrays


def from_haiku():
    f = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 6])(x)))
    return f.apply, f.init(KEY, X)


def bare():
    w = jax.random.normal(KEY, (2, 6, 6))
    return lambda p, x: jnp.tanh(x @ p["one"]) @ p["two"], {"one": w[0], "two": w[1]}


MODELS = {
    "linen": lambda: linen(nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(6)])),
    "linen attention": lambda: linen(nn.MultiHeadDotProductAttention(2)),
    "linen scan": lambda: linen(Scanned()),
    "linen scan and remat": lambda: linen(Scanned(remat=True)),
    "nnx": from_nnx,
    "equinox": from_equinox,
    "haiku": from_haiku,
    "bare": bare,
}


@pytest.mark.parametrize("name", MODELS)
def test_train_freeze_merge(name):
    f, params = MODELS[name]()
    before = jax.tree.map(np.array, params)
    found = jlora.layouts(f, params, X)
    frozen, lora = jlora.lorafy(params, rank=2, alpha=4, key=KEY, layouts=found)
    assert all(a is b for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(params), strict=True))  # not a copy
    apply = jlora.lift(f, strict=True)

    def loss(lora):
        return jnp.mean((apply(jlora.combine(frozen, lora), X) - jnp.sin(3 * X)) ** 2)

    tx = optax.adam(3e-2)
    state = tx.init(lora)

    @jax.jit
    def step(lora, state):
        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(lora, updates), state, value

    np.testing.assert_array_equal(apply(jlora.combine(frozen, lora), X), f(params, X))
    values = []
    for _ in range(40):
        lora, state, value = step(lora, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert step._cache_size() == 1
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    want = apply(jlora.combine(frozen, lora), X)
    np.testing.assert_allclose(f(jlora.merge(frozen, lora), X), want, atol=1e-5 * np.abs(want).max())
    assert jax.tree.structure(jlora.merge(frozen, lora)) == jax.tree.structure(params)


def test_the_names_of_boxed_weights_are_those_of_plain_ones():
    """Biases are found by name in NNX's state and in a stack of boxed weights, and get no factors."""
    _, state = from_nnx()
    plain = nnx.to_pure_dict(state)
    for train in (bitfit.make, lambda p: jlora.lorafy(p, config=jlora.LoraConfig(r=2, bias="all"))):
        boxed, bare = (train(params)[1] for params in (state, plain))
        assert list(paths(boxed)) and size(boxed) == size(bare)
        assert entries_of(boxed).keys() == entries_of(bare).keys() >= {"up/bias", "down/bias"}
        for a, b in zip(jax.tree.leaves(boxed), jax.tree.leaves(bare), strict=True):
            np.testing.assert_array_equal(a, b)
    stack = {"kernel": np.ones((3, 6, 6)), "bias": np.ones((3, 6)), "scale": np.ones((3, 6))}
    stack = {name: nn.Partitioned(x, ("layers",)) for name, x in stack.items()}
    _, lora = jlora.lorafy({"layers": stack}, 2, layouts={"kernel": "sio"})
    assert list(entries_of(lora)) == ["layers/kernel"]


@pytest.mark.parametrize("name", MODELS)
def test_one_tree_for_a_train_state(name):
    f, params = MODELS[name]()
    tree = jlora.combine(*jlora.lorafy(params, rank=2, key=KEY, layouts=jlora.layouts(f, params, X)))
    tx = jlora.only_trainable(optax.adam(1e-2))
    state = tx.init(tree)
    grads = jax.grad(lambda t: jnp.sum(jlora.lift(f)(t, X) ** 2))(tree)
    updates, state = tx.update(grads, state, tree)
    after = optax.apply_updates(tree, updates)
    moved = 0
    for on, a, b in zip(*map(jax.tree.leaves, (jlora.trainable_mask(tree), tree, after)), strict=True):
        assert on or (np.array_equal(np.signbit(a), np.signbit(b)) and np.array_equal(a, b))
        moved += bool(on and not np.array_equal(a, b))
    assert moved > 0
    trained = sum(x.size for on, x in zip(*map(jax.tree.leaves, (jlora.trainable_mask(tree), tree)), strict=True) if on)
    assert sum(x.size for x in jax.tree.leaves(state) if np.ndim(x)) == 2 * trained


def test_leaves_that_are_no_arrays_stand_aside():
    """An Equinox module as it is, activation functions and numbers among its leaves."""
    model = eqx.nn.MLP(6, 6, 12, 2, key=KEY)
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, 3)
    frozen, lora = jlora.lorafy(model, 2, layouts={"weight": "oi"})
    arrays = eqx.filter(model, eqx.is_array)
    weights, trained = size(arrays), size(lora)
    assert f"{trained:,} of {weights:,} trained" in jlora.summary(frozen, lora)
    tx = optax.adam(1e-2)
    run = jlora.lift(lambda model, x: jax.vmap(model)(x))
    grads = jax.grad(lambda lora: run(jlora.combine(frozen, lora), X).sum())
    assert jlora.audit(grads, lora, frozen=frozen, lora=lora, opt_state=(tx.init(lora), jnp.tanh)).ok
    mesh = make_mesh("fsdp=1,data=-1")
    where = specs(frozen, {"weight": "oi"}, mesh, min_size=1)
    placed = place(frozen, where, mesh)
    assert placed.activation is model.activation and placed.layers[0].bias == 3
    assert placed.layers[1].weight.sharding.mesh == mesh
    state = (tx.init(lora), jnp.tanh)
    assert jax.tree.leaves(like(state, lora, specs(lora, None, mesh)))[-1] == jax.sharding.PartitionSpec()


def test_methods_carry_the_leaves_that_are_no_arrays():
    """EVA, full tuning, a subspace and a bank, on an Equinox module as it is."""
    model = eqx.nn.MLP(6, 6, 12, 2, key=KEY)
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, None)
    run = jlora.lift(lambda model, x: jax.vmap(model)(x))
    weights = size(eqx.filter(model, eqx.is_array))
    made = {
        "eva": eva.make(model, 2, lambda m, x: jax.vmap(m)(x), [X]),
        "full": full.make(model),
        "intrinsic": intrinsic.make(model, 30),
    }
    assert size(made["full"][1]) == weights and size(made["intrinsic"][1]) == 30
    for frozen, trained in made.values():
        tuned = jlora.combine(frozen, trained)
        assert tuned.activation is model.activation and tuned.layers[0].bias is None
        np.testing.assert_allclose(run(tuned, X), run(model, X), atol=1e-6)
        grads = jax.grad(lambda t, frozen=frozen: jnp.sum(run(jlora.combine(frozen, t), X) ** 2))(trained)
        assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="train: 'ids' matches no leaf"):
        full.make({"w": X, "ids": jnp.arange(3)}, train="ids")
    lora = jax.tree.map(lambda x: x + 0.1, made["eva"][1])
    for base in (model, jlora.quantise(model, "int8", layouts={"weight": "oi"})):
        bank = AdapterBank(base, capacity=2)
        bank.add("a", lora)
        out = run(jlora.combine(base, bank.tree(["a", None])), X[:2])
        want = [run(tree, X[:2]) for tree in (jlora.combine(base, lora), base)]
        np.testing.assert_allclose(out, jnp.stack([want[0][0], want[1][1]]), rtol=1e-5, atol=1e-5)
        merged = bank.merged(base, "a")
        assert merged.activation is model.activation
        np.testing.assert_allclose(run(merged, X), run(jlora.combine(base, lora), X), rtol=1e-5, atol=1e-5)
