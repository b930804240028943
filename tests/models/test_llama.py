"""Logits against transformers on small random checkpoints of each member of the family; adapted without a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.models.llama import Llama, LlamaConfig, hf_tensors

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
LOCAL = ["full_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("LlamaConfig", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8}}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "mistral, a field of Qwen's": ("MistralConfig", {"sliding_window": 4, "use_sliding_window": False}),
    "qwen 2": ("Qwen2Config", {}),
    "qwen 3": ("Qwen3Config", {"head_dim": 16}),
    "qwen 3, a window in no layer": ("Qwen3Config", {**WINDOW, "layer_types": ["full_attention"] * 3}),
}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def tree_of(state, tensors):
    params = {}
    for t in tensors:
        w = state[t.name].numpy().T if t.transpose else state[t.name].numpy()
        *above, name = t.path.split("/")
        at = params
        for part in above:
            at = at.setdefault(part, {})
        at[name] = w if t.layer is None else [*at.get(name, []), w]
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), params, is_leaf=lambda x: isinstance(x, list))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, scan):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, options = CASES[name]
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **options)).eval()
    for _, p in theirs.named_parameters():  # biases start at zero and norms at one: nothing would be compared
        p.data += 0.1 * torch.randn_like(p)
    config = LlamaConfig.from_hf(theirs.config.to_dict())
    tensors = hf_tensors(config, scan)
    missing = set(theirs.state_dict()) - {t.name for t in tensors}
    assert missing <= {"lm_head.weight"}
    params = tree_of(theirs.state_dict(), tensors)
    tokens = np.random.default_rng(0).integers(0, 97, (3, 12))
    mask = np.ones((3, 12), bool)
    mask[0, :4] = mask[1, 9:] = False
    with torch.no_grad():
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        want = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=torch.tensor(positions)
        ).logits.numpy()

    def compare(got):
        off = np.abs(np.where(mask[..., None], got - want, 0)).max() / np.abs(want).max()
        assert off < 1e-5

    compare(Llama(config, scan_layers=scan, remat="dots").apply({"params": params}, tokens, mask=mask))
    model, out = Llama(config, scan_layers=scan), []
    cache = model.init_cache(3, 14)
    for n in range(0, 12, 4):
        part, cache = model.apply({"params": params}, tokens[:, n : n + 4], mask=mask[:, n : n + 4], cache=cache)
        out.append(part)
    compare(np.concatenate(out, 1))


def test_mistrals_window_is_the_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    hub = {"model_type": "mistral", **SIZES}
    assert LlamaConfig.from_hf(hub).sliding_window == transformers.MistralConfig(**SIZES).sliding_window == 4096
    assert LlamaConfig.from_hf({**hub, "sliding_window": None}).sliding_window is None
    fields = {"model_type": "llama", "use_sliding_window": True, "sliding_window": 4}  # which Llama has not
    assert LlamaConfig.from_hf({**hub, **fields}).sliding_window is None


CONFIG = LlamaConfig(97, 32, 48, 3, 4, 2, 8, tie_word_embeddings=True)


@pytest.mark.parametrize("scan, remat", [(True, False), (True, "dots"), (False, True)])
def test_adapted_without_materialising(scan, remat):
    model = Llama(CONFIG, scan_layers=scan, remat=remat)
    tokens = jnp.arange(24).reshape(2, 12)
    params = model.init(jax.random.key(0), tokens)["params"]
    f = lambda p, tokens: model.apply({"params": p}, tokens)
    layouts = jlora.layouts(f, params, tokens)
    assert layouts["embed_tokens/embedding"] == jlora.Layout("embedding", "io", tied=True)
    kinds = {path: layout.kind for path, layout in layouts.items()}
    assert {kind for path, kind in kinds.items() if path.endswith("kernel")} == {"linear"}
    assert {kind for path, kind in kinds.items() if path.endswith("scale")} == {"scale"}
    targets = ["embed_tokens", "all-linear"]
    frozen, lora = jlora.lorafy(params, 2, targets=targets, layouts=layouts)
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    loss = lambda lora: jlora.lift(f, strict=True)(jlora.combine(frozen, lora), tokens)
    np.testing.assert_allclose(jax.jit(loss)(lora), f(jlora.merge(frozen, lora), tokens), rtol=0, atol=2e-4)
    grads = jax.jit(jax.grad(lambda lora: jnp.sum(loss(lora) ** 2)))(lora)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_packed_examples_do_not_see_each_other():
    model = Llama(CONFIG)
    tokens = jnp.arange(12).reshape(1, 12)
    params = model.init(jax.random.key(0), tokens)["params"]
    segments = jnp.array([[1] * 5 + [2] * 5 + [0] * 2])
    positions = jnp.array([[*range(5), *range(5), 0, 0]])
    packed = model.apply({"params": params}, tokens, segment_ids=segments, positions=positions)
    for part in (slice(0, 5), slice(5, 10)):
        np.testing.assert_allclose(packed[:, part], model.apply({"params": params}, tokens[:, part]), atol=1e-5)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"model_type": "x"}, "x"),
        ({"model_type": "qwen2", **WINDOW}, "max_window_layers"),
        ({"model_type": "qwen3", **WINDOW, "max_window_layers": 3, "layer_types": LOCAL}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_an_error(change, text):
    with pytest.raises(ValueError, match=text):
        LlamaConfig.from_hf({"model_type": "llama", **SIZES, **change})


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "hub, theta, scaling",
    [
        ({}, 1e4, None),
        ({"rope_theta": 5e5, "max_position_embeddings": 64}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5, LINEAR),
        ({"rope_theta": 1e4, "rope_parameters": {**LINEAR, "rope_theta": 5e5}}, 5e5, LINEAR),
        ({"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
    ],
)
def test_a_config_is_written_for_those_who_read_it_and_comes_back(hub, theta, scaling):
    config = LlamaConfig.from_hf({"model_type": "llama", **SIZES, **hub})
    told = config.to_hf()
    assert told["rope_theta"] == theta and told.get("rope_scaling") == scaling
    assert told["rope_parameters"] == {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    assert told.get("max_position_embeddings") == hub.get("max_position_embeddings")
    assert LlamaConfig.from_hf(told) == config
