"""The adapter's files: Hugging Face PEFT computes the same logits from them, and they read back bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.io.peft import save_peft
from jlora.io.peft_read import load_peft, read_arrays
from jlora.models.llama import Llama, LlamaConfig, hf_tensors

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
CASES = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all linear, rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {"target_modules": "attention", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 32}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def adapter(scan, options):
    config = LlamaConfig(97, 32, 48, 3, 4, 2, 8, tie_word_embeddings=True)
    model, tensors = Llama(config, scan_layers=scan), hf_tensors(config, scan)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    settings = jlora.LoraConfig(r=4, lora_alpha=16, **options)
    layouts = {t.path: "sio" for t in tensors if t.layer is not None and t.transpose}
    frozen, lora = jlora.lorafy(params, config=settings, layouts=layouts)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), lora)
    return model, tensors, settings, frozen, lora


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_read_back_bit_for_bit(name, scan, tmp_path):
    _, tensors, settings, frozen, lora = adapter(scan, CASES[name])
    save_peft(tmp_path, lora, settings, tensors, "base")
    _, again, _ = load_peft(tmp_path, frozen, tensors)
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, again, lora)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("default")  # peft's own
def test_peft_gives_the_same_logits(name, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, tensors, settings, frozen, lora = adapter(True, CASES[name])
    save_peft(tmp_path, lora, settings, tensors, "base")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_theta=1e4, head_dim=8)
    )
    flat, state = jlora.tree.paths(frozen), {}
    for t in tensors:
        w = np.asarray(flat[t.path] if t.layer is None else flat[t.path][t.layer])
        state[t.name] = torch.tensor(w.T if t.transpose else w)
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    tokens = np.random.default_rng(0).integers(0, 97, (2, 9))
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    with torch.no_grad():
        want = adapted(torch.tensor(tokens)).logits.numpy()
        with adapted.disable_adapter():
            plain = adapted(torch.tensor(tokens)).logits.numpy()
    got = jlora.lift(lambda p, t: model.apply({"params": p}, t), strict=True)(jlora.combine(frozen, lora), tokens)
    assert np.abs(got - plain).max() > 1e-2
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_the_config_says_what_was_trained(tmp_path):
    _, tensors, settings, _, lora = adapter(True, CASES["patterns"])
    save_peft(tmp_path, lora, settings, tensors, "owner/base", revision="v1")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["rank_pattern"] == {f"model.layers.{n}.self_attn.k_proj": 2 for n in range(3)}
    assert config["alpha_pattern"] == {f"model.layers.{n}.self_attn.o_proj": 32.0 for n in range(3)}
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "v1")


@pytest.mark.parametrize("whole", [False, True])
def test_a_table_that_is_the_head_is_written_twice_and_read_only_so(whole, tmp_path):
    options = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]} if whole else CASES["embedding"]
    _, tensors, settings, frozen, lora = adapter(True, options)
    params = jlora.merge(frozen, lora)
    save_peft(tmp_path, lora, settings, tensors, "base")
    held, path = read_arrays(tmp_path), tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["ensure_weight_tying"] is True
    copy = "lm_head.weight" if whole else "lm_head.lora_A.weight"
    twin = held["model.embed_tokens.weight"] if whole else held["model.embed_tokens.lora_embedding_B"].T
    np.testing.assert_array_equal(held[copy], twin)
    path.write_text(json.dumps({**config, "ensure_weight_tying": False}))
    with pytest.raises(ValueError, match=r"model\.embed_tokens is the head of this model too, and PEFT adapted it as"):
        load_peft(tmp_path, params, tensors)
    path.write_text(json.dumps(config))
    save_file({**held, copy: held[copy] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{copy} has no place in the model"):
        load_peft(tmp_path, params, tensors)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "gaussian", True, "eva"])
def test_factors_of_a_changed_base_are_refused(init, tmp_path):
    _, tensors, settings, frozen, lora = adapter(True, CASES["q and v"])
    save_peft(tmp_path, lora, settings, tensors, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    if init in ("gaussian", True, "eva"):
        load_peft(tmp_path, frozen, tensors)
        return
    with pytest.raises(
        ValueError, match=f"on a base that '{init}' changed: .*path_initial_model_for_weight_conversion"
    ):
        load_peft(tmp_path, frozen, tensors)


@pytest.mark.parametrize("patterns, alike", [({"rank_pattern": {"v_proj": 2}}, False), ({}, True)])
def test_the_card_says_what_vllm_would_scale_wrongly(patterns, alike, tmp_path):
    _, tensors, settings, _, lora = adapter(True, {**CASES["q and v"], **patterns})
    save_peft(tmp_path, lora, settings, tensors, "base")
    assert ("vLLM scales all modules alike" in (tmp_path / "README.md").read_text()) is not alike


def test_another_model_is_refused(tmp_path):
    _, tensors, settings, frozen, lora = adapter(True, CASES["q and v"])
    save_peft(tmp_path, lora, settings, tensors, "base")
    wider = {
        **frozen,
        "layers": jax.tree.map(lambda w: jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, 8)]), frozen["layers"]),
    }
    with pytest.raises(ValueError, match=r"q_proj: A \[4, 32\] with B \[32, 4\], for .* \[32, 40\]"):
        load_peft(tmp_path, wider, tensors)
    fewer = [t for t in tensors if "v_proj" not in t.name]
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.v_proj\.lora_A\.weight has no place"):
        load_peft(tmp_path, frozen, fewer)


def test_damaged_files_are_refused(tmp_path):
    _, tensors, settings, frozen, lora = adapter(True, CASES["q and v"])
    save_peft(tmp_path, lora, settings, tensors, "base")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="cut short or no safetensors"):
        load_peft(tmp_path, frozen, tensors)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-20])
    with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
        load_peft(tmp_path, frozen, tensors)
    config.write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        load_peft(tmp_path, frozen, tensors)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_peft(tmp_path, frozen, tensors)
