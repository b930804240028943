"""PEFT on the same weights: the same logits, the same adapter after a step of SGD, files there and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.io import load
from jlora.io.adapters import load_adapter, save_adapter
from jlora.io.peft_kin import as_keys_and_values
from jlora.io.peft_read import read_arrays
from jlora.methods import named
from jlora.methods.columns import reading
from tests.io.test_from_peft import TOKENS, their_model

pytestmark = pytest.mark.filterwarnings("default")  # peft's own
LORA = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8}
CASES = {
    "LoRA": ("Llama", "LoraConfig", LORA),
    "rsLoRA": ("Llama", "LoraConfig", {**LORA, "use_rslora": True}),
    "DoRA": ("Llama", "LoraConfig", {**LORA, "use_dora": True}),
    "IA3": (
        "Llama",
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "IA3, fused": (
        "GPT2",
        "IA3Config",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "IA3, an encoder and its head": (
        "Roberta",
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "modules_to_save": ["classifier"],
        },
    ),
    "prompt tuning": ("Llama", "PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prompt tuning, GPT-2": ("GPT2", "PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p-tuning": ("Llama", "PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
    "prefix tuning": ("Llama", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "prefix tuning, GPT-2": ("GPT2", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_parity(case, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    family, kind, options = CASES[case]
    theirs, task = their_model(family)
    theirs.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(theirs, getattr(peft, kind)(task_type=task, **options)).eval()
    torch.manual_seed(1)
    trains = [x for x in adapted.parameters() if x.requires_grad]
    for x in trains:
        x.data += 0.1 * torch.randn_like(x)
    adapted.save_pretrained(tmp_path / "theirs")
    tokens, size = torch.tensor(TOKENS), TOKENS.shape[1]
    theirs_of = lambda model: model(tokens).logits[:, -size:] if task == "CAUSAL_LM" else model(tokens).logits
    before = theirs_of(adapted)

    base = load(str(tmp_path / "base"), head="classify") if task == "SEQ_CLS" else load(str(tmp_path / "base"))
    frozen, trained, what = load_adapter(base, tmp_path / "theirs")
    run = jlora.lift(reading(base.model, frozen, trained).apply, strict=True)
    ours_of = jax.jit(lambda trained: run({"params": jlora.combine(frozen, trained)}, jnp.asarray(TOKENS)))
    close(ours_of(trained), before.detach().numpy())
    plain = base.model.apply({"params": base.params}, jnp.asarray(TOKENS))
    assert np.abs(plain - ours_of(trained)).max() > 1e-3 * np.abs(plain).max()

    save_adapter(tmp_path / "again", base, trained, what)
    first, second = read_arrays(tmp_path / "theirs"), read_arrays(tmp_path / "again")
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)

    if case != "p-tuning":  # PEFT trains the network, whose outputs are what its file holds
        labels = TOKENS[:, 1:] if task == "CAUSAL_LM" else np.array([0, 2])
        cut = (lambda x: x[:, :-1]) if task == "CAUSAL_LM" else lambda x: x
        logits = cut(before)
        torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.tensor(labels).reshape(-1)
        ).backward()
        for x in trains:
            x.data -= 0.5 * x.grad
        adapted.save_pretrained(tmp_path / "theirs stepped")
        loss = lambda t: optax.softmax_cross_entropy_with_integer_labels(cut(ours_of(t)), labels).mean()
        trained = jax.tree.map(lambda x, g: x - 0.5 * g, trained, jax.grad(loss)(trained))
        save_adapter(tmp_path / "stepped", base, trained, what)
        want, got = read_arrays(tmp_path / "theirs stepped"), read_arrays(tmp_path / "stepped")
        for name, array in want.items():
            close(got[name], array)
            assert np.abs(array - first[name]).max() > 0, name

    folder = tmp_path / ("stepped" if case != "p-tuning" else "again")
    back = peft.PeftModel.from_pretrained(their_model(family)[0], str(folder)).eval()
    with torch.no_grad():
        close(ours_of(trained), theirs_of(back).numpy())


def test_a_layer_prefix_is_written_as_keys_and_values(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    theirs, _ = their_model("Llama")
    theirs.save_pretrained(tmp_path / "base")
    base = load(str(tmp_path / "base"))
    settings = named.MethodConfig(method="prefix", virtual_tokens=3)
    frozen, trained = named.make(base.params, settings, layouts=base.layouts)
    run = jlora.lift(reading(base.model, frozen, trained).apply, strict=True)
    want = run({"params": jlora.combine(frozen, trained)}, jnp.asarray(TOKENS))
    kept = as_keys_and_values(base, frozen, trained)
    save_adapter(tmp_path / "ours", base, kept, settings)
    back = peft.PeftModel.from_pretrained(their_model("Llama")[0], str(tmp_path / "ours")).eval()
    with torch.no_grad():
        close(back(torch.tensor(TOKENS)).logits.numpy(), want)


def test_what_does_not_fit(tmp_path):
    from safetensors.numpy import save_file

    from jlora.io import Pretrained
    from jlora.models.llama import Llama, LlamaConfig, hf_tensors

    config = LlamaConfig(31, 16, 24, 3, 4, 2, 4)
    model = Llama(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    base = Pretrained(model, params, config, None, "tiny", hf_tensors(config))
    for kind, arrays, text in (
        ("PREFIX_TUNING", {"prompt_embeddings": np.ones((2, 47), np.float32)}, r"3 layers of 2 heads of 4 need 48"),
        ("PROMPT_TUNING", {"prompt_embeddings": np.ones((2, 8), np.float32)}, r"8 numbers for an embedding \[31, 16\]"),
        ("PROMPT_TUNING", {"other": np.ones((2, 8), np.float32)}, "one tensor prompt_embeddings"),
        ("IA3", {"model.layers.7.mlp.down_proj.ia3_l": np.ones((1, 24), np.float32)}, "no place for model.layers.7"),
        ("IA3", {"model.layers.1.mlp.down_proj.ia3_l": np.ones((1, 9), np.float32)}, r"\[1, 9\] does not fit \[24\]"),
        ("ADALORAX", {"x": np.ones(1, np.float32)}, "peft_type is 'ADALORAX'"),
    ):
        save_file(arrays, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}')
        with pytest.raises(ValueError, match=text):
            load_adapter(base, tmp_path)
