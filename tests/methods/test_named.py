"""Every method by its name: made, written to one folder, and read back bit for bit; what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from toys import CONFIG, KEY, TOKENS, jitter

import jlora
from jlora.io import Pretrained
from jlora.io.adapters import load_adapter, save_adapter
from jlora.lora import is_adapter, on_plain_base
from jlora.methods import named
from jlora.models.bert import Bert, BertConfig
from jlora.models.bert import hf_tensors as bert_tensors
from jlora.models.llama import Llama, hf_tensors

SMALL = named.MethodConfig(rank=2, width=3, virtual_tokens=3, network=5, dimension=90, targets=("attention",))
SUMS = ["lora+bitfit", "lora+prompt", "lora+prefix", "lora+houlsby", "intrinsic+dora", "pissa+norms"]
LLAMA = Llama(CONFIG)
BERT = BertConfig(31, 16, 24, 2, 4)


@pytest.fixture(scope="module")
def bases():
    """A decoder, and an encoder with biases and a head."""
    params = LLAMA.init(KEY, TOKENS)["params"]
    decoder = Pretrained(LLAMA, params, CONFIG, None, "tiny", hf_tensors(CONFIG))
    model = Bert(BERT, head="classify")
    params = model.init(KEY, TOKENS)["params"]
    return {
        "decoder": decoder,
        "encoder": Pretrained(model, params, BERT, None, "tiny", bert_tensors(BERT, True, "classify")),
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("method", [*named.METHODS, *SUMS])
def test_there_and_back(method, bases, tmp_path):
    base = bases["encoder" if "bitfit" in method else "decoder"]
    settings = dataclasses.replace(SMALL, method=method, targets=SMALL.targets if method != "ia3" else named.EVERY)
    frozen, trained = named.make(base.params, settings, layouts=base.layouts, key=KEY)
    trained = jitter(trained)
    save_adapter(tmp_path, base, trained, settings, card={"steps": 3})
    frozen_again, again, what = load_adapter(base, tmp_path)
    same(again, trained)
    if (
        "pissa" not in method and method != "olora"
    ):  # those change the base: `jlora train` writes them for the plain one
        same(frozen_again, frozen)
    held = json.loads((tmp_path / "adapter_config.json").read_text())
    own = {"ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix-kv": "PREFIX_TUNING"}
    assert held["peft_type"] in ("LORA", "JLORA", own.get(method))
    assert (held["peft_type"] == "LORA") == isinstance(what, jlora.LoraConfig)
    assert (held["peft_type"] == "LORA") == (method in (*named.LORA_KIN, "lora+bitfit", "pissa+norms"))
    if held["peft_type"] == "JLORA":
        assert what == settings
    assert not list(tmp_path.glob("*.part"))


def test_changed_bases_are_written_for_the_plain_one(bases):
    base = bases["decoder"]
    for method in ("pissa", "olora+norms"):
        settings = dataclasses.replace(SMALL, method=method)
        frozen, start = named.make(base.params, settings, layouts=base.layouts, key=KEY)
        trained = jitter(start, 0.05)
        want = jlora.merge(frozen, trained)
        found = on_plain_base(trained, start)
        plain = jax.tree.map(lambda f, p: None if f is None else p, frozen, base.params, is_leaf=lambda x: x is None)
        got = jlora.merge(plain, found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_eva_looks_past_what_trains_whole(bases):
    base = bases["encoder"]
    settings = dataclasses.replace(SMALL, method="eva+bitfit", targets=("query",))
    apply = lambda params, batch: base.model.apply({"params": params}, batch)
    make = lambda sight: named.make(base.params, settings, layouts=base.layouts, train="classifier", sight=sight)
    _, trained = make(named.Sight(apply, [TOKENS, TOKENS + 1]))
    (a,) = (e.lora_a for e in jax.tree.leaves(trained, is_leaf=lambda e: hasattr(e, "lora_a")) if hasattr(e, "lora_a"))
    there = np.asarray(a[0])[:, np.asarray(a[0]).any(0)]
    np.testing.assert_allclose(there.T @ there, np.eye(there.shape[1]), atol=1e-4)
    drawn = jax.tree.leaves(make(None)[1], is_leaf=lambda e: hasattr(e, "lora_a"))
    assert not any(np.allclose(np.sum(e.lora_a[0] ** 2, 0), 1) for e in drawn if hasattr(e, "lora_a"))


def test_ia3_takes_the_groups_that_lora_takes(bases):
    base = bases["decoder"]
    for group, own in (("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}), ("mlp", {"gate_proj", "up_proj"})):
        settings = dataclasses.replace(SMALL, method="ia3", targets=(group,))
        frozen, trained = named.make(base.params, settings, layouts=base.layouts, key=KEY)
        vectors = {path.split("/")[-2]: leaf for path, leaf in jlora.tree.paths(trained, is_adapter).items()}
        assert set(vectors) == own | ({"down_proj"} if group == "mlp" else set())
        widths = {name: frozen["layers"][where(name)][name]["kernel"].shape[-1] for name in own}
        assert {name: vectors[name].scale.shape[-1] for name in own} == widths
    assert vectors["down_proj"].scale.shape == (3, CONFIG.intermediate_size)  # what it multiplies is scaled
    gone = dataclasses.replace(SMALL, method="ia3", targets=("mlp",))
    with pytest.raises(ValueError, match="targets: 'mlp' matches no matrix"):
        named.make({"q_proj": {"kernel": TOKENS * 1.0}}, gone)


def where(name):
    return "self_attn" if name[0] in "qkvo" else "mlp"


def test_refusals(bases, tmp_path):
    base = bases["decoder"]
    for method, text in (
        ("lroa", r"'lroa' is not known: lora"),
        ("lora+lora", "each once"),
        ("full+lora", "nothing is left"),
    ):
        with pytest.raises(ValueError, match=text):
            named.make(base.params, named.MethodConfig(method=method))
    sight = named.Sight(lambda params, batch: base.model.apply({"params": params}, batch), [TOKENS])
    for settings in (
        {"method": "eva", "init": "pissa"},
        {"method": "eva+olora"},
        {"method": "adalora+pissa"},
        {"method": "adalora", "init": "olora"},
    ):
        for seen in (sight, None):  # a dry run sees no batch
            with pytest.raises(ValueError, match="takes its factors out of the base"):
                named.make(base.params, dataclasses.replace(SMALL, **settings), layouts=base.layouts, sight=seen)
    settings = dataclasses.replace(SMALL, method="houlsby")
    _, trained = named.make(base.params, settings, layouts=base.layouts)
    save_adapter(tmp_path, base, trained, settings)
    other = dataclasses.replace(base, params=jax.tree.map(lambda x: x[..., :4], base.params))
    with pytest.raises(ValueError, match=r"does not fit the model: layers/mlp/down_proj/kernel \[3, 24, 16\] is"):
        load_adapter(other, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    text, whole = config.read_text(), weights.read_bytes()
    weights.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cut short or no safetensors"):
        load_adapter(base, tmp_path)
    weights.write_bytes(whole)
    for old, new, said in (
        ("AdapterLayer", "Unheard", "kind 'Unheard' is not known"),
        ('arrays/down"', 'arrays/dawn"', "arrays/dawn is missing"),
        ('"scaling"', '"scalding"', "scalding"),
        ('"form": 1', '"form": 2', "form 2 is not read"),
        ('"trees"', '"threes"', "damaged: 'trees'"),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            load_adapter(base, tmp_path)
    config.write_text(text)
    peft = pytest.importorskip("peft")
    with pytest.raises(Exception, match="JLORA"):
        peft.PeftConfig.from_pretrained(str(tmp_path))
