"""Prefixes against the same thing written out: embeddings joined, keys and values replaced, a cache, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import CONFIG, KEY, TOKENS, encoder, jitter, stacks

import jlora
from jlora.generate import GenerateConfig, generate, pad_left
from jlora.methods import prefix, prefix_kv
from jlora.methods.columns import reading
from jlora.methods.together import together
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama
from jlora.tree import size

N = 3
V = CONFIG.vocab_size


def llama(scan=True, config=CONFIG):
    model = Llama(config, scan_layers=scan)
    params = model.init(KEY, TOKENS)["params"]
    return model, params, lambda p, t, m=None: model.apply({"params": p}, t, mask=m)


@pytest.mark.parametrize("scan", [True, False])
def test_virtual_ids_read_as_the_tokens_they_start_as(scan):
    _, params, apply = llama(scan)
    like = jnp.array([5, 9, 2])
    frozen, trained = prefix.embedding(params, N, like=like)
    assert size(trained) == N * CONFIG.hidden_size
    lifted = jlora.lift(prefix.with_prefix(apply, N, V), strict=True)
    got = jax.jit(lifted)(jlora.combine(frozen, trained), TOKENS)
    real = jnp.concatenate([jnp.broadcast_to(like, (2, N)), TOKENS], 1)
    np.testing.assert_allclose(got, apply(params, real)[:, N:], atol=1e-5)
    infix = real.at[:, 4].set(V + 1)  # one inside the text, trained
    moved = jlora.lift(apply, strict=True)(jlora.combine(frozen, trained), infix)
    np.testing.assert_allclose(moved, apply(params, real.at[:, 4].set(9)), atol=1e-5)
    grad = jax.grad(lambda t: lifted(jlora.combine(frozen, t), TOKENS).sum())(trained)
    assert all(jnp.abs(row).max() > 0 for row in jax.tree.leaves(grad)[0])
    with pytest.raises(ValueError, match=r"3 virtual tokens, which is no weight: it cannot be merged"):
        jlora.merge(frozen, trained)


def test_reparameterised_then_settled():
    _, params, apply = llama()
    frozen, trained = prefix.embedding(params, N, hidden=8)
    d = CONFIG.hidden_size
    assert size(trained) == N * d + 2 * 8 * d
    settled = prefix.settle(trained)
    assert size(settled) == N * d
    run = jlora.lift(prefix.with_prefix(apply, N, V), strict=True)
    one, two = (run(jlora.combine(frozen, t), TOKENS) for t in (trained, settled))
    np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_layer_prefix_that_repeats_the_model_changes_nothing(scan):
    """With each layer's own normalised inputs as its trained columns the outputs are those of real tokens."""
    _, params, apply = llama(scan)
    like = jnp.array([5, 9, 2])
    real = jnp.concatenate([like[None], TOKENS[:1]], 1)
    seen = []

    def watch(next_fun, args, kwargs, context):
        if context.module.name in ("k_proj",) and context.method_name == "__call__":
            seen.append(args[0][0, :N])
        return next_fun(*args, **kwargs)

    import flax.linen as nn

    loop = params if not scan else None
    one = Llama(CONFIG, scan_layers=False)
    loop = loop or {
        **{k: v for k, v in params.items() if k != "layers"},
        **{f"layers_{n}": jax.tree.map(lambda x, n=n: x[n], params["layers"]) for n in range(3)},
    }
    with nn.intercept_methods(watch):
        one.apply({"params": loop}, real)
    assert len(seen) == 3
    frozen, trained = prefix.layer(params, N, layouts=stacks(params) if scan else None)
    assert size(trained) == 3 * CONFIG.hidden_size * N
    places = iter(seen)
    own = jax.tree.map(lambda x: jnp.stack(seen) if scan else next(places), trained)
    run = jlora.lift(prefix.with_prefix(apply, N, 0, step=0), strict=True)
    got = run(jlora.combine(frozen, own), TOKENS[:1])
    np.testing.assert_allclose(got, apply(params, real)[:, N:], atol=1e-5)
    assert jnp.abs(run(jlora.combine(frozen, trained), TOKENS[:1]) - got).max() > 1e-2
    grads = jax.grad(lambda t: jnp.sum(run(jlora.combine(frozen, t), TOKENS) ** 2))(trained)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match=r"has a prefix.*cannot be merged"):
        jlora.merge(frozen, trained)


def test_encoder_and_padding():
    """An encoder takes it too; in a decoder padding before the prompt changes nothing."""
    apply, params = encoder()
    frozen, trained = prefix.layer(params, 2)
    run = jlora.lift(lambda p, t: apply(p, prefix.columns(t, None, 2, 0)[0])[:, 2:], strict=True)
    a, b = (run(jlora.combine(frozen, t), TOKENS) for t in (trained, jitter(trained)))
    assert jnp.abs(a - b).max() > 1e-3
    _, params, apply = llama()
    frozen, trained = prefix.layer(params, N)
    run = jlora.lift(prefix.with_prefix(apply, N, 0, step=0), strict=True)
    tuned = jlora.combine(frozen, trained)
    padded = jnp.concatenate([jnp.zeros((2, 2), TOKENS.dtype), TOKENS], 1)
    mask = jnp.arange(9) >= 2
    got = run(tuned, padded, jnp.broadcast_to(mask, (2, 9)))[:, 2:]
    np.testing.assert_allclose(got, run(tuned, TOKENS), atol=1e-5)


@pytest.mark.parametrize("how", ["embedding", "layer", "both with lora"])
def test_steps_with_a_cache_equal_the_whole(how):
    model, params, apply = llama()
    makes = {
        "embedding": [lambda p: prefix.embedding(p, N)],
        "layer": [lambda p: prefix.layer(p, N)],
        "both with lora": [
            lambda p: jlora.lorafy(p, 2, key=KEY, layouts=stacks(p)),
            lambda p: prefix.embedding(p, N),
            lambda p: prefix.layer(p, N),
        ],
    }[how]
    frozen, trained = together(params, *makes)
    tuned = jlora.combine(frozen, jitter(trained, 0.2))
    tokens, _ = prefix.columns(TOKENS, None, N, V)
    tokens = tokens if how != "layer" else tokens.at[:, :N].set(0)
    whole = jlora.lift(apply, strict=True)(tuned, tokens)
    step = jlora.lift(lambda p, t, cache: model.apply({"params": p}, t, cache=cache), strict=True)
    logits, cache = step(tuned, tokens[:, :6], model.init_cache(2, 16))
    got = [logits]
    for n in range(6, tokens.shape[1]):
        logits, cache = step(tuned, tokens[:, n : n + 1], cache)
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), whole, atol=2e-5)


PROMPTS = [[5, 9, 2, 7], [11], [3, 3, 8, 1, 4, 6]]
NEW = 5


def beams_without_cache(scores, prompt, k):
    """Beam search over whole sequences: the k best continuations at every step, the best at the end."""
    held = [(0.0, [])]
    for _ in range(NEW):
        logs = [jax.nn.log_softmax(scores(prompt + new)) for _, new in held]
        longer = [(s + float(log[t]), [*new, t]) for (s, new), log in zip(held, logs, strict=True) for t in range(V)]
        held = sorted(longer, key=lambda pair: -pair[0])[:k]
    return held[0][1]


@pytest.mark.parametrize("how", ["embedding", "infix", "layer"])
def test_generation_reads_the_prefix(how):
    """Greedy and beam search through the cache, prompts padded together, equal whole sequences one at a time."""
    model, params, apply = llama()
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 2 else x, params)  # distributions with clear winners
    infix = 2 if how == "infix" else 0
    frozen, trained = prefix.layer(params, N) if how == "layer" else prefix.embedding(params, N + infix, infix=infix)
    tuned = jlora.combine(frozen, jitter(trained, 0.5))
    read = reading(model, frozen, trained)
    step, first = (0, 0) if how == "layer" else (1, V)
    prompts = [[*prompt, *range(V + N, V + N + infix)] for prompt in PROMPTS]  # after the prompt, as in the paper
    run = jax.jit(jlora.lift(prefix.with_prefix(apply, N, first, step=step), strict=True))

    def scores(tokens):
        padded = jnp.zeros((1, 14), int).at[0, : len(tokens)].set(jnp.array(tokens))
        return run(tuned, padded, jnp.arange(14)[None] < len(tokens))[0, len(tokens) - 1]

    for k in (1, 3):
        if how == "infix" and k > 1:
            continue
        got = generate(read, tuned, *pad_left(prompts, 4), GenerateConfig(max_new_tokens=NEW, beams=k))
        assert got == [beams_without_cache(scores, prompt, k) for prompt in prompts]
    plain = generate(model, params, *pad_left(PROMPTS, 4), GenerateConfig(max_new_tokens=NEW, beams=k))
    assert got != plain and not any(token >= V for row in got for token in row)


def test_fused_projection_takes_a_layer_prefix():
    """GPT-2's c_attn: with each layer's own normalised inputs as columns, the outputs are those of real tokens."""
    model = GPT2(GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2), scan_layers=False)
    params = model.init(KEY, TOKENS)["params"]
    real = jnp.concatenate([jnp.array([[5, 9, 2]]), TOKENS[:1]], 1)
    _, seen = model.apply({"params": params}, real, capture_intermediates=lambda module, _: module.name == "ln_1")
    norms = iter([seen["intermediates"][f"h_{n}"]["ln_1"]["__call__"][0] for n in range(2)])
    frozen, trained = prefix.layer(params, N)
    assert size(trained) == 2 * 8 * N
    own = jax.tree.map(lambda x: next(norms)[0, :N], trained)
    run = jlora.lift(
        prefix.with_prefix(lambda p, t, m: model.apply({"params": p}, t, mask=m), N, 0, step=0), strict=True
    )
    got = run(jlora.combine(frozen, own), TOKENS[:1])
    np.testing.assert_allclose(got, model.apply({"params": params}, real)[:, N:], atol=1e-5)


def joined(like):
    return jnp.concatenate([jnp.broadcast_to(like, (2, len(like))), TOKENS], 1)


def kept_of(model, params, like):
    """The keys and values that the model itself makes of the tokens `like`."""
    cache = model.init_cache(1, len(like))
    _, cache = model.apply({"params": params}, like[None], cache=cache, method="hidden")
    return prefix_kv.KeptColumns(*(jnp.swapaxes(x[:, 0], 1, 2).reshape(len(x), len(like), -1) for x in cache["kv"]))


def test_kept_keys_and_values_are_the_tokens_they_were_made_of():
    model, params, apply = llama()
    like = jnp.array([5, 9, 2])
    frozen, trained = prefix_kv.make(params, 3, layouts=stacks(params))
    assert size(trained) == 2 * 3 * 3 * 8  # two key heads of four, three layers and columns
    own = kept_of(model, params, like)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, trained)
    read = jlora.lift(reading(model, frozen, own).apply, strict=True)
    run = jax.jit(lambda t, tokens, mask: read({"params": jlora.combine(frozen, t)}, tokens, mask=mask))
    np.testing.assert_allclose(run(own, TOKENS, None), apply(params, joined(like))[:, 3:], atol=1e-5)
    padded = jnp.pad(TOKENS, ((0, 0), (2, 0)))
    got = run(own, padded, jnp.broadcast_to(jnp.arange(9) >= 2, (2, 9)))[:, 2:]
    np.testing.assert_allclose(got, apply(params, joined(like))[:, 3:], atol=1e-5)
    grads = jax.grad(lambda t: jnp.sum(run(t, TOKENS, None) ** 2))(trained)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match=r"keys and values in 3 layers, which is no weight"):
        jlora.merge(frozen, trained)
    loop = llama(False)[1]
    assert prefix_kv.make(loop, 3)[1].keys.shape == trained.keys.shape
    gpt = {"h": {"attn": {"c_attn": {"kernel": jnp.ones((4, 6, 18))}}}}
    assert prefix_kv.make(gpt, 2, layouts={"c_attn": "sio"})[1].keys.shape == (4, 2, 6)


def test_generation_after_kept_keys_and_values():
    model, params, _ = llama()
    params = jax.tree.map(lambda x: 3 * x, params)
    like = jnp.array([5, 9, 2])
    kept = kept_of(model, params, like)
    read, tuned = reading(model, params, kept), jlora.combine(params, kept)
    config = GenerateConfig(max_new_tokens=5, beams=2, end=(3,))
    got = generate(read, tuned, np.asarray(TOKENS), np.ones(TOKENS.shape, bool), config)
    whole = np.asarray(joined(like))
    assert got == generate(model, params, whole, np.ones(whole.shape, bool), config)
    assert got != generate(model, params, np.asarray(TOKENS), np.ones(TOKENS.shape, bool), config)


def test_relative_positions_of_deberta_are_no_columns():
    """Its keys' weight also multiplies a table of positions: the prefix of real activations repeats the model."""
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = DebertaConfig(**sizes, num_attention_heads=2, position_buckets=4, share_att_key=True, norm_rel_ebd=True)
    model = Deberta(config, scan_layers=False)
    real = jnp.concatenate([jnp.array([[5, 9, 2]]), TOKENS[:1]], 1)
    params = jitter(model.init(KEY, real)["params"])
    keep = lambda module, _: module.name == "embeddings"
    _, seen = model.apply({"params": params}, real, capture_intermediates=keep)
    (inputs,) = seen["intermediates"]["embeddings"]["__call__"]
    frozen, trained = prefix.layer(params, N)
    own = jax.tree.map(lambda x: inputs[0, :N], trained)
    run = jlora.lift(lambda p, t: model.apply({"params": p}, t), strict=True)
    got = run(jlora.combine(frozen, own), real.at[:, :N].set(1))[:, N:]
    np.testing.assert_allclose(got, model.apply({"params": params}, real)[:, N:], atol=1e-5)


def test_refusals():
    model, params, _ = llama()
    frozen, trained = together(params, lambda p: prefix.embedding(p, 2), lambda p: prefix.layer(p, 3))
    with pytest.raises(ValueError, match=r"prefixes of \[2, 3\] columns"):
        reading(model, frozen, trained)
    frozen, trained = prefix.embedding(params, 2)
    packed = jlora.lift(reading(model, frozen, trained).apply)
    with pytest.raises(ValueError, match="packed examples cannot"):
        packed({"params": jlora.combine(frozen, trained)}, TOKENS, segment_ids=jnp.ones_like(TOKENS))

    with pytest.raises(ValueError, match="table='x' is no embedding"):
        prefix.embedding(params, 2, table="x")
    with pytest.raises(ValueError, match=r"like is \[1\], and 2 virtual tokens"):
        prefix.embedding(params, 2, like=jnp.array([1]))
    size = params["embed_tokens"]["embedding"].shape[0]
    for wrong in (-1, size):  # an index past the table would be its last row
        with pytest.raises(ValueError, match=rf"ids of embed_tokens/embedding lie in 0..{size - 1}: \[{wrong}\]"):
            prefix.embedding(params, 2, like=[size - 1, wrong])
    with pytest.raises(ValueError, match="0 virtual tokens"):
        prefix.embedding(params, 0)
    with pytest.raises(ValueError, match="2 virtual tokens, 3 inside"):
        prefix.embedding(params, 2, infix=3)
    with pytest.raises(ValueError, match="side by side"):
        prefix.layer({"a": {"k_proj": {"kernel": jnp.ones((2, 2))}}, "b": {"v_proj": {"kernel": jnp.ones((2, 2))}}}, 2)
