"""`jlora train --method`: every name trains, is saved, and evaluates and generates alike from its folder."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jlora
from jlora.bank import AdapterBank, Shelf
from jlora.cli import main
from jlora.commands.parts import going_on, method_of, optimiser_of
from jlora.commands.settings import TrainConfig
from jlora.io import Pretrained, load
from jlora.io.adapters import load_adapter, save_adapter
from jlora.io.save import save
from jlora.methods import bitfit, named
from jlora.models import llama
from jlora.models.gpt2 import GPT2, GPT2Config, hf_tensors
from jlora.models.llama import Llama, LlamaConfig
from tests.small import WORDS, rows, small_model, tokenizer

# one of each kind of plumbing; tests/methods/test_named.py makes, saves and reads every name
METHODS = ["pissa", "full", "lora+p-tuning", "ia3+houlsby", "eva", "adalora+norms"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return {"model": small_model(folder / "model"), "data": rows(folder, 24)}


def result(capsys, *args):
    main(list(args))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_read(method, place, tmp_path, capsys):
    args = ["train", "--json", "--model", place["model"], "--data", place["data"], "--eval-data", place["data"]]
    args += ["--method", method, "--output", str(tmp_path), "--steps", "8", "--batch", "24", "--buckets", "1"]
    args += [
        "--learning-rate",
        "0.02",
        "--width",
        "4",
        "--virtual-tokens",
        "3",
        "--samples",
        "1" if "tuning" in method else "0",
    ]
    report = result(capsys, *args, "--rank", "4", "--targets", "q_proj", "v_proj")
    assert report["after"]["loss"] < report["before"]["loss"] - 0.05
    adapter = ["--model", place["model"], "--adapter", str(tmp_path / "adapter")]
    judged = result(capsys, "eval", "--json", "--data", place["data"], "--batch", "24", "--buckets", "1", *adapter)
    assert judged["base"]["loss"] == pytest.approx(report["before"]["loss"], abs=1e-5)
    assert judged["adapter"]["loss"] == pytest.approx(report["after"]["loss"], abs=2e-5)


@pytest.mark.parametrize("adapter", [None, "one to go on from"])
def test_lora_plus_moves_b_faster(adapter):
    config = TrainConfig("m", "d", method="lora-plus", optimiser="sgd", learning_rate=0.1, warmup=0, clip=0.0)
    config = dataclasses.replace(config, adapter=adapter)
    _, lora = named.make({"a": {"kernel": jnp.ones((4, 4))}}, method_of(config))
    tx = optimiser_of(config, 10)
    moved, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)
    np.testing.assert_allclose(moved["a"]["kernel"].lora_a, -0.1, rtol=1e-6)
    np.testing.assert_allclose(moved["a"]["kernel"].lora_b, -1.6, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "lora+houlsby"])
def test_training_goes_on_under_the_adapter_s_own_dropout(method, place, tmp_path):
    base, settings = load(place["model"]), named.MethodConfig(method, rank=2, width=2, dropout=0.25)
    save_adapter(tmp_path / "x", base, named.make(base.params, settings, layouts=base.layouts)[1], settings)
    config = TrainConfig(place["model"], place["data"], adapter=str(tmp_path / "x"))
    assert going_on(config).dropout == going_on(dataclasses.replace(config, dropout=0.25)).dropout == 0.25
    with pytest.raises(ValueError, match=r"dropout = 0.1, and that of .*x is 0.25: leave it out"):
        going_on(dataclasses.replace(config, dropout=0.1))
    args = ["--adapter", str(tmp_path / "x"), "--output", str(tmp_path / "run"), "--steps", "1", "--buckets", "1"]
    main(["train", "--model", place["model"], "--data", place["data"], *args])
    written = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert (written["method"], written["rank"], written["dropout"]) == (method, 2, 0.25)


OWN = {
    "lora": {"targets": ("v_proj", "q_proj")},
    "dora": {"targets": ("q_proj",)},
    "rslora": {"targets": ("q_proj",), "rslora": True},
    "lora+bitfit": {"targets": ("q_proj",)},
    "lora-plus+houlsby": {"width": 2},
    "ia3": {},
}


@pytest.mark.parametrize("method", OWN)
def test_training_goes_on_with_the_adapter_s_own_method(method, tmp_path):
    sizes = LlamaConfig(15, 32, 48, 2, 4, 2, 8, qkv_bias=True)
    model, how = Llama(sizes), {} if method == "ia3" else {"rank": 2, "alpha": 3.0, **OWN[method]}
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    base = Pretrained(model, params, sizes, None, "small", llama.hf_tensors(sizes))
    settings, folder = named.MethodConfig(method, **how), str(tmp_path / "x")
    save_adapter(folder, base, named.make(base.params, settings, layouts=base.layouts)[1], settings)
    config = TrainConfig("m", "d", adapter=folder)
    own = going_on(config)
    plain = method.replace("lora-plus", "lora")
    assert set(own.targets) == set(settings.targets)
    assert method_of(own) == dataclasses.replace(settings, method=plain, targets=own.targets)
    assert going_on(own) == own == going_on(dataclasses.replace(config, method=method if plain == method else "lora"))
    faster = going_on(dataclasses.replace(config, method="lora-plus"))
    assert going_on(faster) == faster and "lora-plus" in named.names_of(faster.method)
    assert dataclasses.replace(faster, method=plain) == own
    others = {"rank": 64, "alpha": 1.0, "targets": ("up_proj",), "method": "pissa", "init": "gaussian", "width": 5}
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"{name} = .*, and that of .*x is .*: leave it out"):
            going_on(dataclasses.replace(config, **{name: value}))


def test_export_converts_or_says_why_not(place, tmp_path, capsys):
    base = load(place["model"])
    for method, kind in (("prefix", "PREFIX_TUNING"), ("prompt", "PROMPT_TUNING"), ("houlsby", None)):
        settings = named.MethodConfig(method=method, virtual_tokens=3, width=2)
        _, trained = named.make(base.params, settings, layouts=base.layouts)
        save_adapter(tmp_path / method, base, trained, settings)
        args = ["export", "--model", place["model"], "--adapter", str(tmp_path / method), "--output"]
        if kind is None:
            with pytest.raises(SystemExit, match="1"):
                main([*args, str(tmp_path / "out")])
            assert "PEFT has no file that is the same as houlsby" in capsys.readouterr().err
            continue
        main([*args, str(tmp_path / f"{method} out")])
        held = json.loads((tmp_path / f"{method} out" / "adapter_config.json").read_text())
        assert held["peft_type"] == kind and held["num_virtual_tokens"] == 3


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=len(WORDS), n_positions=32, n_embd=24, n_layer=2, n_head=4)
    params = GPT2(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    base = Pretrained(GPT2(config), params, config, tokenizer(), "small", hf_tensors(config))
    save(folder / "model", base, params)
    return {"model": str(folder / "model"), "data": rows(folder, 24)}


def test_a_prefix_takes_positions_of_a_table(gpt2, tmp_path, capsys):
    """32 of them: 25 columns leave no room for a row of 12 tokens, which would read NaN."""
    place = ["--model", gpt2["model"], "--data", gpt2["data"]]
    says = "small has 32 positions, 25 of them its prefix's, a row has 12 tokens: set max_length to 7"

    def refused(*args):
        with pytest.raises(SystemExit, match="1"):
            main([*args, *place])
        return says.replace("small", gpt2["model"]) in capsys.readouterr().err

    train = ["train", "--output", str(tmp_path / "run"), "--steps", "1"]
    for more in (["prefix"], ["prompt", "--dry-run"]):
        assert refused(*train, "--virtual-tokens", "25", "--method", *more)
    base, settings = load(gpt2["model"]), named.MethodConfig("prefix-kv", virtual_tokens=25)
    save_adapter(tmp_path / "kv", base, named.make(base.params, settings)[1], settings)
    assert refused("eval", "--adapter", str(tmp_path / "kv"))


def c_attn(base, adapter=None):
    frozen, lora = (base.params, None) if adapter is None else load_adapter(base, adapter)[:2]
    merged = base.params if lora is None else jlora.merge(frozen, lora)
    return np.split(np.asarray(merged["h"]["attn"]["c_attn"]["kernel"]), 3, axis=-1)


def test_query_and_value_of_a_fused_weight(gpt2, tmp_path, capsys):
    """`--parts x-x`: the keys stay as they were through training, going on, merging, in PEFT's folder and a server."""
    parts = ["--targets", "c_attn", "--parts", "x-x", "--rank", "3", "--alpha", "6"]
    args = ["train", "--json", "--model", gpt2["model"], "--data", gpt2["data"], "--eval-data", gpt2["data"]]
    args += ["--steps", "6", "--batch", "24", "--buckets", "1", "--learning-rate", "0.02", "--samples", "0"]
    report = result(capsys, *args, *parts, "--output", str(tmp_path / "run"))
    assert report["after"]["loss"] < report["before"]["loss"] - 0.05
    told = yaml.safe_load((tmp_path / "run/settings.yaml").read_text())
    held = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert told["parts"] == held["settings"]["parts"] == "x-x" and held["peft_type"] == "JLORA"

    result(capsys, *args, "--adapter", str(tmp_path / "run/adapter"), "--output", str(tmp_path / "more"))
    base, adapter = load(gpt2["model"]), ["--model", gpt2["model"], "--adapter", str(tmp_path / "more/adapter")]
    before, after = c_attn(base), c_attn(base, tmp_path / "more/adapter")
    np.testing.assert_array_equal(after[1], before[1])
    assert all(np.abs(after[n] - before[n]).max() > 1e-3 for n in (0, 2))

    main(["merge", *adapter, "--output", str(tmp_path / "merged"), "--dtype", "float32"])
    main(["export", *adapter, "--output", str(tmp_path / "peft")])
    assert "plain LoRA of rank 6" in capsys.readouterr().err
    held = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (held["peft_type"], held["r"], held["lora_alpha"], held["rank_pattern"]) == ("LORA", 6, 12.0, {})
    for one, other, third in zip(
        after, c_attn(load(str(tmp_path / "merged"))), c_attn(base, tmp_path / "peft"), strict=True
    ):
        np.testing.assert_allclose(other, one, atol=1e-6)
        np.testing.assert_allclose(third, one, atol=1e-6)
    shelf = Shelf(base, AdapterBank(base.params, capacity=1, rank=6))
    shelf.pin(asked := shelf.put("x", tmp_path / "more/adapter"))
    lifted = jlora.lift(lambda params: base.model.apply({"params": params}, jnp.arange(8)[None]))
    served = lifted(jlora.combine(base.params, shelf.bank.tree([asked])))
    np.testing.assert_allclose(served, lifted(load(str(tmp_path / "merged")).params), atol=1e-5)


def test_parts_that_nobody_would_carry_out_are_refused(gpt2):
    base = load(gpt2["model"])
    good = {"targets": ("c_attn",), "parts": "x-x", "rank": 2}
    for change, said in (
        ({"parts": "q-v"}, "a letter for each part"),
        ({"parts": "---"}, "a letter for each part"),
        ({"parts": "x-xx-"}, "does not divide into the parts"),
        ({"method": "dora"}, "only lora and lora-plus"),
        ({"method": "bitfit"}, "only lora and lora-plus"),
        ({"rslora": True}, "only lora and lora-plus"),
        ({"init": "gaussian"}, "only lora and lora-plus"),
        ({"targets": named.EVERY}, "name the fused weights in targets"),
    ):
        with pytest.raises(ValueError, match=said):
            named.make(base.params, named.MethodConfig(**{**good, **change}), layouts=base.layouts)
    _, sums = named.make(base.params, named.MethodConfig("lora+norms", **good), layouts=base.layouts)
    assert jlora.tree.size(sums) == 2 * 2 * 2 * (24 * 2) + jlora.tree.size(bitfit.norms(base.params)[1])
