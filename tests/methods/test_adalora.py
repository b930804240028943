"""AdaLoRA: importance and budget against PEFT's allocator, the schedule, the regulariser, and where ranks end."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import KEY, TOKENS, encoder, jitter, stacks

import jlora
from jlora.methods import adalora
from jlora.methods.adalora import Budget

PARAMS = {name: {"kernel": jnp.zeros(shape)} for name, shape in {"a": (6, 5), "b": (5, 7), "c": (7, 4)}.items()}


def test_schedule():
    budget = Budget(8, 2, 100, warmup=10, final=30)
    assert [int(budget.at(n, 3)) for n in (1, 10, 70, 71, 100)] == [24, 24, 6, 6, 6]
    middle = [int(budget.at(n, 3)) for n in range(10, 71)]
    assert middle == [int(18 * (1 - n / 60) ** 3 + 6 + 1e-9) for n in range(61)]
    for wrong in ((2, 8, 100), (8, 0, 100), (8, 2, 10, 5, 5)):
        with pytest.raises(ValueError, match=r"ranks from|leave none between"):
            Budget(*wrong)
    with pytest.raises(ValueError, match="no weight of this tree"):
        adalora.update_budget(1, {}, {}, {}, budget)


@pytest.mark.parametrize("options", [{"init": "olora"}, {"config": jlora.LoraConfig(init_lora_weights="olora")}])
def test_an_init_that_changes_the_base_is_refused(options):
    with pytest.raises(ValueError, match="init 'olora' takes its factors out of the base, and AdaLoRA has"):
        adalora.make(PARAMS, 2, **options)


def test_regulariser():
    _, trained = adalora.make(PARAMS, 3, key=KEY)
    trained = jitter(trained)
    want = 0.0
    for e in trained.values():
        p, q = (np.asarray(x, np.float64) for x in (e["kernel"].p, e["kernel"].q))
        want += np.sum((p.T @ p - np.eye(3)) ** 2) + np.sum((q @ q.T - np.eye(3)) ** 2)
    np.testing.assert_allclose(adalora.regulariser(trained), want, rtol=1e-5)


def test_peft_allocates_the_same():
    """PEFT's own allocator on the same weights and gradients: the same triples are zero after every step."""
    torch = pytest.importorskip("torch")
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    budget = Budget(4, 1, 24, warmup=3, final=5, interval=2)
    _, trained = adalora.make(PARAMS, 4, key=KEY)
    trained, state = jitter(trained), adalora.init_budget(trained)
    entry = lambda tree, name: tree[name]["kernel"]
    holder = torch.nn.ParameterDict()
    for name in PARAMS:
        for kind in "AEB":
            holder[f"{name}_lora_{kind}_x"] = torch.nn.Parameter(torch.zeros(()))
    names = {f"{name}.lora_{kind}.x": holder[f"{name}_lora_{kind}_x"] for name in PARAMS for kind in "AEB"}
    model = types.SimpleNamespace(named_parameters=lambda: names.items())

    def load(tree, to):
        for name in PARAMS:
            e = entry(tree, name)
            for kind, x in (("A", e.p.T), ("E", e.lam[:, None]), ("B", e.q.T)):
                array = torch.tensor(np.array(x))
                target = names[f"{name}.lora_{kind}.x"]
                if to == "grad":
                    target.grad = array
                else:
                    target.data = array

    load(trained, "data")
    config = types.SimpleNamespace(
        beta1=0.85, beta2=0.85, tinit=3, tfinal=5, total_step=24, deltaT=2, target_r=1, init_r=4
    )
    theirs = layer.RankAllocator(model, config, "x")
    update = jax.jit(adalora.update_budget, static_argnums=4)
    zeros = []
    for step in range(1, 19):
        grads = jax.tree.map(lambda x, n=step: jax.random.normal(jax.random.key(n * 99 + x.size), x.shape), trained)
        trained = jax.tree.map(lambda x, g: x - 0.02 * g, trained, grads)
        load(trained, "data")
        load(grads, "grad")
        trained, state = update(step, trained, grads, state, budget)
        theirs.update_and_allocate(model, step)
        for name in PARAMS:
            got, want = entry(trained, name).lam, names[f"{name}.lora_E.x"].detach().numpy()[:, 0]
            np.testing.assert_allclose(got, want, atol=1e-6)
        zeros.append(sum(int((entry(trained, name).lam == 0).sum()) for name in PARAMS))
    for ours, means in (("sensitivity", theirs.exp_avg_ipt), ("uncertainty", theirs.exp_avg_unc)):
        for name, parts in zip(PARAMS, state[ours], strict=True):
            for kind, x in zip("AEB", parts, strict=True):
                want = means[f"{name}.lora_{kind}.x"].numpy()
                np.testing.assert_allclose(x[0].T if kind != "E" else x.T, want, atol=1e-6)
    assert zeros[:3] == [0, 0, 0] and zeros[-1] == 12 - int(budget.at(18, 3)) and 0 in zeros[4:]
    last = None
    for step in range(19, 25):
        grads = jax.tree.map(jnp.ones_like, trained)
        trained = jax.tree.map(lambda x: x + 0.01, trained)
        trained, state = update(step, trained, grads, state, budget)
        ranks = adalora.ranks(trained)
        last = last or ranks
        assert sum(n for found in ranks.values() for n in found) == 3
        assert ranks == last


def test_training_ends_in_plain_factors_of_the_budget():
    apply, params = encoder()
    frozen, trained = adalora.make(params, 4, alpha=8, key=KEY, layouts=stacks(params), targets=["query", "dense"])
    budget = Budget(4, 1, 12, warmup=2, final=3)
    lifted = jlora.lift(apply, strict=True)
    labels = TOKENS % 5

    def loss(trained):
        out = lifted(jlora.combine(frozen, trained), TOKENS)
        fit = optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()
        return fit + 0.1 * adalora.regulariser(trained)

    tx = optax.adam(0.05)

    @jax.jit
    def step(n, trained, opt, state):
        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt = tx.update(grads, opt)
        trained, state = adalora.update_budget(n, optax.apply_updates(trained, updates), grads, state, budget)
        return trained, opt, state, value

    opt, state, values = tx.init(trained), adalora.init_budget(trained), []
    for n in range(1, 13):
        trained, opt, state, value = step(n, trained, opt, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]

    _, alone = adalora.make(params, 4, alpha=8, key=KEY, layouts=stacks(params), targets=["query", "dense"])
    whole = adalora.budgeted(tx, budget)

    @jax.jit
    def plain(trained, opt):
        fit = lambda t: loss(t) - 0.1 * adalora.regulariser(t)
        updates, opt = whole.update(jax.grad(fit)(trained), opt, trained)
        return optax.apply_updates(trained, updates), opt

    opt = whole.init(alone)
    for _ in range(12):
        alone, opt = plain(alone, opt)
    assert adalora.ranks(alone) == adalora.ranks(trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), alone, trained)
    found = adalora.ranks(trained)
    assert sum(n for counts in found.values() for n in counts) == 12  # four matrices a layer, three layers, one each
    settled = adalora.settle(trained)
    entries = jlora.tree.paths(settled, lambda x: isinstance(x, jlora.LoraFactors))
    assert {path: e.lora_a.shape[-1] for path, e in entries.items()} == {p: max(c) for p, c in found.items() if any(c)}
    both = [jlora.merge(frozen, t) for t in (trained, settled)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *both)
