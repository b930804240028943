"""A row of a mixed batch is what its adapter gives alone; writing into a bank compiles nothing until it grows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.bank import AdapterBank, BankFull, Shelf, with_rows
from jlora.bank import bank as bank_module
from jlora.io.load import load
from jlora.io.peft import save_peft
from jlora.models.llama import Llama, LlamaConfig
from tests.small import small_model

TOKENS = jax.random.randint(jax.random.key(9), (5, 7), 0, 15)


def adapter(params, seed, rank=4, targets="all-linear", layouts=None):
    """Random factors, by numpy: nothing is compiled."""
    shapes = jax.eval_shape(lambda: jlora.lorafy(params, rank, alpha=3.0, targets=targets, layouts=layouts)[1])
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda like: draw.normal(0, 0.2, like.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=[True, False], ids=["scan", "layers"])
def made(request):
    config = LlamaConfig(15, 32, 48, 2, 4, 2, 8)
    model = Llama(config, scan_layers=request.param)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    layouts = {r"layers/.*kernel": "sio"} if request.param else None
    adapters = {
        "a": adapter(params, 1, 4, layouts=layouts),
        "b": adapter(params, 2, 2, ["q_proj", "v_proj"], layouts),
        "c": adapter(params, 3, 7, "mlp", layouts),
    }
    return model, params, adapters


@pytest.mark.parametrize("method", ["gather", "dense", "auto"])
def test_each_row_is_its_adapter_alone(made, method):
    model, params, adapters = made
    bank = AdapterBank(params, capacity=2, rank=4, most=4, method=method)
    for name, lora in adapters.items():
        bank.add(name, lora)
    assert (bank.capacity, bank.rank) == (4, 8)
    names = ["b", None, "a", "c", "b"]
    apply = jax.jit(jlora.lift(model.apply, strict=True))
    out = apply({"params": jlora.combine(params, bank.tree(names))}, TOKENS)
    for n, name in enumerate(names):
        tree = jlora.combine(params, adapters[name]) if name else params
        alone = apply({"params": tree}, TOKENS[n : n + 1])
        np.testing.assert_allclose(out[n], alone[0], atol=1e-5, rtol=1e-5)
    far = apply({"params": params}, TOKENS)
    assert float(jnp.abs(out - far)[2].max()) > 0.05 and float(jnp.abs(out - far)[1].max()) < 1e-5


def test_auto_multiplies_all_of_few_slots_where_a_row_is_one_token(made):
    model, params, adapters = made
    text = {}
    for method in ("gather", "dense", "auto"):
        for most in (3, 40):
            bank = AdapterBank(params, capacity=most, rank=4, method=method)
            bank.add("a", adapters["a"])
            tree = jlora.combine(params, bank.tree(["a", None]))
            for s in (1, 3):
                text[method, most, s] = str(jax.make_jaxpr(jlora.lift(model.apply))({"params": tree}, TOKENS[:2, :s]))
    for most, s in [(3, 1), (3, 3), (40, 1)]:
        assert text["gather", most, s] != text["dense", most, s]
        assert text["auto", most, s] == text["dense" if (most, s) == (3, 1) else "gather", most, s]


@pytest.mark.parametrize("method", ["gather", "dense"])
def test_one_adapter_of_huge_numbers_spoils_no_other_row(made, method):
    model, params, adapters = made
    scaled = lambda size: jax.tree.map(lambda x: np.full(x.shape, size, np.float32), adapters["a"])
    bank = AdapterBank(params, capacity=3, rank=4, method=method)
    bank.add("huge", scaled(1e38))
    bank.add("b", adapters["b"])
    apply = jlora.lift(model.apply)
    out = apply({"params": jlora.combine(params, bank.tree(["huge", None, "b"]))}, TOKENS[:3, :1])
    assert not jnp.isfinite(out[0]).all()
    for row, tree in ((1, params), (2, jlora.combine(params, adapters["b"]))):
        np.testing.assert_allclose(out[row], apply({"params": tree}, TOKENS[row : row + 1, :1])[0], atol=1e-5)


def test_factors_that_overflow_when_scaled_are_refused_by_name(made):
    _, params, adapters = made
    is_factors = lambda e: isinstance(e, jlora.lora.LoraFactors)
    scaled = lambda scaling, size: jax.tree.map(
        lambda e: dataclasses.replace(e, lora_b=np.full_like(e.lora_b, size), scaling=scaling),
        adapters["b"],
        is_leaf=is_factors,
    )
    bank = AdapterBank(params, capacity=2)
    with pytest.raises(ValueError, match=r"adapter 'x': .*q_proj/kernel has factors that are not finite once scaled"):
        bank.add("x", scaled(4.0, 3e38))
    assert "x" not in bank and not bank.factors
    half = AdapterBank(params, capacity=2, dtype=jnp.float16)
    with pytest.raises(ValueError, match="not finite"):
        half.add("x", scaled(4.0, 3e4))
    half.add("x", scaled(1.0, 3e4))


def test_one_merged_is_its_adapter_and_shares_the_rest(made):
    _, params, adapters = made
    bank = AdapterBank(params, capacity=3, rank=8)
    for name in ("b", "c", "a"):
        bank.add(name, adapters[name])
    for name, lora in adapters.items():
        want = jlora.merge(params, lora)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), bank.merged(params, name), want)
    bank = AdapterBank(params, capacity=3, rank=8)
    bank.add("b", adapters["b"])
    same = jax.tree.map(lambda x, y: x is y, bank.merged(params, "b"), params)
    touched = {path for path, kept in jlora.tree.paths(same).items() if not kept}
    assert touched and all(path.split("/")[-2] in ("q_proj", "v_proj") for path in touched)
    assert bank.merged(params, None) is params


def test_writing_compiles_nothing_until_it_grows(made):
    model, params, adapters = made
    bank = AdapterBank(params, capacity=3, rank=8, most=6)
    count = []

    @jax.jit
    def run(params, tree, rows):
        count.append(1)
        return jlora.lift(model.apply, strict=True)({"params": jlora.combine(params, with_rows(tree, rows))}, TOKENS)

    def row(name):
        return run(params, bank.tree(), jnp.full(5, bank.slot(name), jnp.int32))[0]

    bank.add("a", adapters["a"])
    first = row("a")
    bank.add("b", adapters["b"])
    bank.add("a", adapters["c"])
    assert float(jnp.abs(row("a") - first).max()) > 0.01
    bank.remove("a")
    bank.add("again", adapters["a"])
    np.testing.assert_allclose(row("again"), first, atol=1e-6)
    assert len(count) == 1
    for n in range(3):
        bank.add(n, adapters["b"])
    np.testing.assert_allclose(row("again"), first, atol=1e-6)
    assert len(count) == 2


def test_the_longest_unused_makes_room_but_not_a_pinned_one(made):
    _, params, adapters = made
    bank = AdapterBank(params, capacity=2)
    bank.add("a", adapters["a"])
    bank.add("b", adapters["b"])
    bank.slot("a")
    bank.add("c", adapters["c"])
    assert "a" in bank and "b" not in bank
    bank.pin("a")
    bank.pin("c")
    with pytest.raises(BankFull, match="all 2 adapter slots"):
        bank.add("b", adapters["b"])
    bank.unpin("c")
    bank.add("b", adapters["b"])
    assert "a" in bank and "c" not in bank


def test_a_thousand_are_resident_and_each_is_itself(made):
    model, params, adapters = made
    is_factors = lambda e: isinstance(e, jlora.lora.LoraFactors)

    def scaled(n):
        return jax.tree.map(lambda e: dataclasses.replace(e, scaling=n / 500), adapters["b"], is_leaf=is_factors)

    bank = AdapterBank(params, capacity=1000, rank=2)
    for n in range(1000):
        bank.add(n, scaled(n))
    names = [3, 999, 500, None, 250]
    apply = jax.jit(jlora.lift(model.apply, strict=True))
    out = apply({"params": jlora.combine(params, bank.tree(names))}, TOKENS)
    assert len(bank) == 1000
    for n, name in enumerate(names):
        merged = jlora.merge(params, scaled(name or 0))
        np.testing.assert_allclose(out[n], apply({"params": merged}, TOKENS[n : n + 1])[0], atol=1e-5)


@pytest.mark.parametrize("rolled_back", [True, False])
def test_growing_that_breaks_off_harms_no_adapter(made, monkeypatch, rolled_back):
    _, params, adapters = made
    bank = AdapterBank(params, capacity=1, rank=4, most=4)

    def right(*names):
        for name in names:
            want = jlora.merge(params, adapters[name])
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), bank.merged(params, name), want)

    bank.add("a", adapters["a"])
    before = {path: (held.slots, held.a.shape) for path, held in bank.factors.items()}
    grow, calls = bank_module.resized, []

    def short(*args):
        calls.append(1)
        if len(calls) == 4 or (len(calls) > 4 and not rolled_back):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return grow(*args)

    for name in ("b", "c"):  # one slot more, then a larger rank
        with monkeypatch.context() as patch:
            patch.setattr(bank_module, "resized", short)
            calls.clear()
            with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
                bank.add(name, adapters[name])
        assert (bank.capacity, bank.rank) == ((1, 4) if name == "b" else (2, 4)) and name not in bank
        after = {path: (held.slots, held.a.shape) for path, held in bank.factors.items()}
        assert (after == before) == rolled_back
        right("a")
        if name == "b":
            bank.add("a", adapters["a"])  # written into arrays of two sizes
            right("a")
            bank.add("b", adapters["b"])
            before = {path: (held.slots, held.a.shape) for path, held in bank.factors.items()}
    bank.add("c", adapters["c"])
    assert (bank.capacity, bank.rank) == (4, 8)
    right("a", "b", "c")


def test_what_does_not_fit_is_named(made):
    model, params, adapters = made
    bank = AdapterBank(params)
    bank.add("a", adapters["a"])
    wrong = jax.tree.map(
        lambda e: dataclasses.replace(e, lora_a=e.lora_a[..., :-1, :]),
        adapters["a"],
        is_leaf=lambda e: isinstance(e, jlora.lora.LoraFactors),
    )
    with pytest.raises(ValueError, match=r"adapter 'x': .*kernel has factors"):
        bank.add("x", wrong)
    _, whole = jlora.lorafy(params, 2, targets=r".*lm_head/kernel", train=["norm"])
    with pytest.raises(ValueError, match="merge it"):
        bank.add("x", whole)
    with pytest.raises(ValueError, match="2 adapter indices for a batch of 5"):
        jlora.lift(model.apply)({"params": jlora.combine(params, bank.tree(["a", "a"]))}, TOKENS)
    with pytest.raises(ValueError, match=r"no one weight|strict=True forbids"):
        tree = jlora.combine(params, bank.tree(["a"]))
        jlora.lift(lambda p: jax.tree.map(jnp.sin, p), strict=True)(tree)
    with pytest.raises(ValueError, match="no one weight"):
        next(
            iter(e for e in jax.tree.leaves(tree, is_leaf=jlora.leaves.is_implicit) if jlora.leaves.is_implicit(e))
        ).materialise()


def test_a_shelf_reads_from_disk_and_keeps_versions(tmp_path):
    base = load(small_model(tmp_path / "base"))
    trees = {}
    for n in range(3):
        trees[n] = adapter(base.params, n, 2, layouts=base.layouts)
        save_peft(tmp_path / f"{n}", trees[n], jlora.LoraConfig(r=2, lora_alpha=3), base.tensors, "small")
    shelf = Shelf(base, AdapterBank(base.params, capacity=2))
    apply = jlora.lift(base.model.apply)

    def out(held):
        rows = jnp.asarray([shelf.bank.slot(held)])
        return apply({"params": jlora.combine(base.params, with_rows(shelf.bank.tree(), rows))}, TOKENS[:1])

    def alone(n):
        return apply({"params": jlora.combine(base.params, trees[n])}, TOKENS[:1])

    old = shelf.put("film", tmp_path / "0")
    shelf.pin(old)
    new = shelf.put("film", tmp_path / "1")
    shelf.pin(new)
    np.testing.assert_allclose(out(old), alone(0), atol=1e-5)
    np.testing.assert_allclose(out(new), alone(1), atol=1e-5)
    third = shelf.put("third", tmp_path / "2")
    with pytest.raises(BankFull):
        shelf.pin(third)
    shelf.unpin(old)
    shelf.pin(third)
    assert old not in shelf.bank
    np.testing.assert_allclose(out(third), alone(2), atol=1e-5)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        shelf.put("absent", tmp_path)
    for held in (new, third):
        shelf.unpin(held)
    later, other = shelf.put("later", tmp_path / "0"), shelf.put("other", tmp_path / "2")
    save_peft(tmp_path / "0", trees[1], jlora.LoraConfig(r=2, lora_alpha=3), base.tensors, "small")
    with pytest.raises(ValueError, match="0 was written over since it was loaded as 'later'"):
        shelf.pin(later)
    settings = tmp_path / "1" / "adapter_config.json"
    scaled = shelf.put("scaled", tmp_path / "1")
    settings.write_text(settings.read_text().replace('"lora_alpha": 3', '"lora_alpha": 6'))
    with pytest.raises(ValueError, match="1 was written over since it was loaded as 'scaled'"):
        shelf.pin(scaled)
    assert shelf.pin(other)


def test_what_breaks_off_between_two_writes_leaves_the_others_whole(made, monkeypatch):
    _, params, adapters = made
    bank = AdapterBank(params, capacity=3, rank=8)
    bank.add("a", adapters["a"])
    want = bank.merged(params, "a")
    real, calls = jnp.asarray, []

    def short(x, *args, **kwargs):
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(bank_module.jnp, "asarray", short)
    with pytest.raises(RuntimeError, match="EXHAUSTED"):
        bank.add("b", adapters["b"])
    monkeypatch.undo()
    assert "b" not in bank
    jax.tree.map(np.testing.assert_array_equal, bank.merged(params, "a"), want)
