"""Parts of a fused weight: the written-out sum, the other parts untouched, loralib's files, damaged ones of its own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import KEY, TOKENS, jitter

import jlora
from jlora.io import Pretrained
from jlora.io.adapters import load_adapter, save_adapter
from jlora.io.loralib import loralib_arrays, unmerged
from jlora.methods import fused
from jlora.methods.lora_plus import lora_plus
from jlora.methods.named import MethodConfig
from jlora.models.gpt2 import GPT2, GPT2Config, hf_tensors
from jlora.tree import size

CONFIG = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2)
ENABLE = (True, False, True)


def test_query_and_value_of_c_attn():
    model = GPT2(CONFIG)
    params = model.init(KEY, TOKENS)["params"]
    apply = jax.jit(lambda p, t: model.apply({"params": p}, t))
    frozen, trained = fused.make(params, 3, alpha=6, parts={"c_attn/kernel": ENABLE}, key=KEY)
    assert size(trained) == 2 * (2 * 2) * 8 * 3
    lifted = jax.jit(jlora.lift(apply, strict=True))
    np.testing.assert_allclose(lifted(jlora.combine(frozen, trained), TOKENS), apply(params, TOKENS), atol=1e-5)
    grads = jax.grad(lambda t: jnp.sum(lifted(jlora.combine(frozen, t), TOKENS) ** 2))(trained)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads)[1::2])  # every B, as A's is zero at first

    moved = jitter(trained)
    (entry,) = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, fused.FusedFactors))
    merged = jlora.merge(frozen, moved)
    held, now = (np.asarray(tree["h"]["attn"]["c_attn"]["kernel"]) for tree in (params, merged))
    for layer, (a, b) in enumerate(zip(entry.lora_a, entry.lora_b, strict=True)):
        delta = np.concatenate([2 * a[:, 0] @ b[0], np.zeros((8, 8)), 2 * a[:, 1] @ b[1]], axis=1)
        np.testing.assert_allclose(now[layer] - held[layer], delta, atol=1e-5)
        np.testing.assert_array_equal(now[layer, :, 8:16], held[layer, :, 8:16])  # the keys
    np.testing.assert_allclose(lifted(jlora.combine(frozen, moved), TOKENS), apply(merged, TOKENS), atol=1e-5)

    arrays = loralib_arrays(fused.settle(moved), hf_tensors(CONFIG), ENABLE)
    a, b = (arrays[f"transformer.h.1.attn.c_attn.lora_{x}"] for x in "AB")
    assert (a.shape, b.shape) == ((6, 8), (16, 3))
    a, b, _ = unmerged(a, b, (8, 24), ENABLE)
    np.testing.assert_allclose(2 * a @ b, delta, atol=1e-5)


def test_lora_plus_knows_every_b():
    params = {"c_attn": {"kernel": jnp.ones((4, 9))}}
    _, trained = fused.make(params, 2, parts={"c_attn": ENABLE})
    tx = lora_plus(optax.sgd, 0.1, ratio=3)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trained), tx.init(trained), trained)
    entry = updates["c_attn"]["kernel"]
    np.testing.assert_allclose(entry.lora_a, -0.1, rtol=1e-6)
    np.testing.assert_allclose(entry.lora_b, -0.3, rtol=1e-6)


def test_refusals():
    params = {"c_attn": {"kernel": jnp.ones((4, 9))}}
    for options, text in (
        ({"parts": {"c_attn": (True, False)}}, r"c_attn/kernel \[4, 9\] does not divide"),
        ({"parts": {"c_attn": (False,) * 3}}, "or none is True"),
        ({"parts": {"q_proj": (True,)}}, "'q_proj' matches no"),
        ({"parts": {"c_attn": (True,)}, "rank": 0}, "rank 0"),
    ):
        with pytest.raises(ValueError, match=text):
            fused.make(params, **{"rank": 2, **options})


def test_damaged_folders(tmp_path):
    model = GPT2(CONFIG)
    base = Pretrained(model, model.init(KEY, TOKENS)["params"], CONFIG, None, "tiny", hf_tensors(CONFIG))
    trained = jitter(fused.make(base.params, 3, parts={"c_attn/kernel": ENABLE})[1])
    save_adapter(tmp_path, base, trained, MethodConfig(targets=("c_attn",), parts="x-x"))
    _, again, what = load_adapter(base, tmp_path)
    assert what.parts == "x-x"
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    file = tmp_path / "adapter_config.json"
    held = json.loads(file.read_text())
    fields = held["trees"][0]["h/attn/c_attn/kernel"]["fields"]
    for name, value, said in (
        ("enable", {"tuple": [True, True, True]}, "damaged"),
        ("enable", {"tuple": [True, True]}, r"factors at .* for a weight \[2, 8, 24\]"),
        ("enable", "x-x", "the parts at h/attn/c_attn/kernel are 'x-x'"),
        ("enable", {"tuple": [True, "no", True]}, "the parts at h/attn/c_attn/kernel are"),
        ("layout", "soi", r"factors at .* for a weight \[2, 8, 24\]"),
        ("lora_a", 3.0, "lora_a is 3.0"),
    ):
        fields[name], kept = value, fields[name]
        file.write_text(json.dumps(held))
        fields[name] = kept
        with pytest.raises(ValueError, match=said):
            load_adapter(base, tmp_path)
