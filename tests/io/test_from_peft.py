"""Adapters that PEFT wrote give PEFT's logits here and go back to PEFT with the same, tensors bit for bit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.io.peft import save_peft
from jlora.io.peft_read import Part, entry_of, load_peft, read_arrays

pytestmark = pytest.mark.filterwarnings("default")  # peft's own
LLAMA = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
BERT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CASES = {
    "plain": ("Llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}),
    "regex": ("Llama", {"target_modules": r".*\.(mlp\.up|self_attn\.o)_proj", "r": 4}),
    "rsLoRA": ("Llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "use_rslora": True}),
    "DoRA": ("Llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_dora": True}),
    "DoRA on some layers": (
        "Llama",
        {"target_modules": ["q_proj"], "r": 4, "use_dora": True, "layers_to_transform": [0, 2]},
    ),
    "patterns": (
        "Llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "r": 4,
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
            "alpha_pattern": {"k_proj": 32},
        },
    ),
    "layers": ("Llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "r": 4}),
    "head saved whole": ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 4}),
    "embedding": ("Llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "tied embedding": ("Tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "r": 4}),
    "tied embedding saved whole": (
        "Tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "r": 4},
    ),
    "trained rows": ("Llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5], "r": 4}),
    "fan_in_fan_out": ("GPT2", {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "fan_in_fan_out": True}),
    "biases of all": ("GPT2", {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "bias": "all"}),
    "biases of the adapted": (
        "GPT2",
        {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "encoder and its head": (
        "Roberta",
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "r": 4},
    ),
}
TOKENS = np.random.default_rng(0).integers(2, 97, (2, 9))
TOKENS[:, 3] = 5


def their_model(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "Roberta":
        config = transformers.RobertaConfig(**BERT, pad_token_id=1, num_labels=3)
        return transformers.RobertaForSequenceClassification(config).eval(), "SEQ_CLS"
    if family == "GPT2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval(), "CAUSAL_LM"
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=family == "Tied")
    return transformers.LlamaForCausalLM(config).eval(), "CAUSAL_LM"


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    family, options = CASES[case]
    theirs, task = their_model(family)
    theirs.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type=task, **options)).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
            assert "lora" in name or "modules_to_save" in name or "bias" in name or "token" in name
    adapted.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = adapted(torch.tensor(TOKENS)).logits.numpy()
    base = load(str(tmp_path / "base"), head="classify") if task == "SEQ_CLS" else load(str(tmp_path / "base"))
    frozen, lora, config = load_adapter(base, tmp_path / "theirs")

    apply = lambda p: base.model.apply({"params": p}, jnp.asarray(TOKENS))
    plain = np.asarray(apply(base.params))
    got = np.asarray(jlora.lift(apply, strict=True)(jlora.combine(frozen, lora)))
    assert np.abs(plain - want).max() > 2e-3 * np.abs(want).max()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    merged = np.asarray(apply(jlora.merge(frozen, lora)))
    assert np.abs(merged - want).max() <= 1e-4 * np.abs(want).max()

    save_peft(tmp_path / "ours", lora, config, base.tensors, str(tmp_path / "base"), task=task)
    fresh, _ = their_model(family)
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        back = again(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(back, want, atol=1e-5 * np.abs(want).max())
    if case not in ("patterns", "layers", "DoRA on some layers"):  # there, zeros stand for what the file leaves out
        first, second = read_arrays(tmp_path / "theirs"), read_arrays(tmp_path / "ours")
        if "whole" not in case:  # the base's own, which PEFT writes along
            first = {k: x for k, x in first.items() if k not in ("model.embed_tokens.weight", "lm_head.weight")}
        assert set(first) == set(second)
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name], err_msg=name)
    _, reread, _ = load_peft(tmp_path / "ours", base.params, base.tensors)
    for a, b in zip(jlora.tree.paths(reread).values(), jlora.tree.paths(lora).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_adapter_trained_by_peft_goes_on_here_and_back(tmp_path):
    import jax
    import optax

    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    theirs, task = their_model("Llama")
    theirs.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"], r=4))
    rate = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0)
    tokens = torch.tensor(TOKENS)
    for _ in range(5):
        rate.zero_grad()
        before = adapted(tokens, labels=tokens).loss
        before.backward()
        rate.step()
    adapted.save_pretrained(tmp_path / "theirs")
    base = load(str(tmp_path / "base"))
    frozen, lora, config = load_adapter(base, tmp_path / "theirs")
    lifted = jlora.lift(lambda p: base.model.apply({"params": p}, jnp.asarray(TOKENS)), strict=True)

    def loss(lora):
        logits = lifted(jlora.combine(frozen, lora))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    with torch.no_grad():
        theirs_now = float(adapted(tokens, labels=tokens).loss)
    assert abs(float(loss(lora)) - theirs_now) < 1e-5 < abs(theirs_now - float(before))
    for _ in range(5):
        lora = jax.tree.map(lambda x, g: x - 1.0 * g, lora, jax.grad(loss)(lora))
    after = float(loss(lora))
    assert after < theirs_now - 1e-3
    save_peft(tmp_path / "ours", lora, config, base.tensors, str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(their_model("Llama")[0], str(tmp_path / "ours"))
    with torch.no_grad():
        assert abs(float(again(tokens, labels=tokens).loss) - after) < 1e-5


def test_an_alpha_of_0_in_one_layer_of_a_stack_is_told():
    part = lambda layer, scaling: Part(layer, np.ones((4, 2)), np.ones((2, 4)), scaling, None)
    with pytest.raises(ValueError, match="q/kernel: alpha is 0 in some layers of the stack and not in others"):
        entry_of(np.zeros((2, 4, 4)), [part(0, 0.0), part(1, 2.0)], np.float32, "q/kernel")
    for first, second, scaled in ((0.0, 0.0, 1.0), (2.0, 0.0, 0.0), (2.0, 1.0, 0.5)):
        entry = entry_of(np.zeros((2, 4, 4)), [part(0, first), part(1, second)], np.float32, "q/kernel")
        assert entry.scaling == first and float(entry.lora_b[1, 0, 0]) == scaled
