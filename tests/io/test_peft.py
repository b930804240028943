"""The adapter's files: Hugging Face PEFT computes the same logits from them, and they read back bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io.peft import load_peft, save_peft
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
    _, tensors, settings, _, lora = adapter(scan, CASES[name])
    save_peft(tmp_path, lora, settings, tensors, "base")
    blank = jax.tree.map(jnp.zeros_like, lora)
    again = load_peft(tmp_path, blank, tensors)
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, again, lora)
    assert not list(tmp_path.glob("*.part"))


# not the embedding: PEFT leaves the tied head without the adapter, jlora adapts the weight wherever it is used
@pytest.mark.parametrize("name", [name for name in CASES if name != "embedding"])
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


def test_another_shape_is_refused(tmp_path):
    _, tensors, settings, _, lora = adapter(True, CASES["q and v"])
    save_peft(tmp_path, lora, settings, tensors, "base")
    _, _, _, _, wider = adapter(True, {"target_modules": "attention"})
    with pytest.raises(ValueError, match=r"k_proj\.lora_A\.weight missing, expected \[4, 32\]"):
        load_peft(tmp_path, wider, tensors)
