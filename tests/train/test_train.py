"""The loss against a dense reference, accumulation, and a resumed run equal to an uninterrupted one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jlora.data import BatchSource, Example
from jlora.train import (
    Checkpoints,
    Interrupted,
    OptimiserConfig,
    answer_sums,
    chunked_sums,
    evaluate,
    fit,
    init_state,
    make_eval_step,
    make_optimiser,
    make_train_step,
)
from jlora.train.loss import label_loss
from jlora.train.optimiser import make_schedule
from jlora.train.report import Metrics, Reporter

VOCAB = 11


class Tiny(nn.Module):
    """A decoder-shaped model: hidden [b, s, d] sees the mean of the tokens so far; head [..., v]."""

    def setup(self):
        self.embed, self.out = nn.Embed(VOCAB, 8), nn.Dense(VOCAB)

    def hidden(self, tokens, *, mask):
        x = self.embed(tokens) * mask[..., None]
        return jnp.tanh(jnp.cumsum(x, axis=1) / (1 + jnp.arange(tokens.shape[1])[:, None]))

    def head(self, hidden):
        return self.out(hidden)

    def __call__(self, tokens, *, mask):
        return self.head(self.hidden(tokens, mask=mask))


MODEL = Tiny()
PARAMS = MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), mask=jnp.ones((1, 4), bool))["params"]
SUMS = answer_sums(MODEL)
sums_fn = lambda trained, frozen, batch, key: SUMS(trained, batch)


def examples(count=24):
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 12, count)
    return [Example(rng.integers(0, VOCAB, n).astype(np.int32), np.arange(n) >= n - rng.integers(1, 4)) for n in sizes]


def source(**kwargs):
    return BatchSource(examples(), kwargs.pop("batch", 8), [8, 16], **kwargs)


def test_what_argmax_names_with_ties_and_numbers_that_are_none():
    draw = np.random.default_rng(0)
    logits = draw.integers(0, 4, (400, 6)).astype(np.float32)  # ties in most rows
    logits[:20, 2] = np.nan
    labels = draw.integers(0, 6, 400)
    _, right = chunked_sums(lambda h: h, jnp.asarray(logits), jnp.asarray(labels), 64)
    finite = np.arange(400) >= 20
    np.testing.assert_array_equal(right[finite], (logits.argmax(-1) == labels)[finite])
    assert not np.any(right[~finite][labels[:20] != 2]) and 0 < np.sum(right) < 200


def test_sums_equal_full_logits():
    batch = source()[1]
    got = SUMS(PARAMS, batch)
    logp = jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, batch["tokens"], mask=batch["mask"]))
    loss, exact, first, tokens = 0.0, 0, 0, 0
    flat = {int(p): int(t) for p, t, w in zip(batch["positions"], batch["labels"], batch["weights"], strict=True) if w}
    for row in range(8):
        hits = []
        for col in range(batch["tokens"].shape[1]):
            if (at := row * batch["tokens"].shape[1] + col) in flat:
                loss -= float(logp[row, col, flat[at]])
                hits.append(int(jnp.argmax(logp[row, col])) == flat[at])
        tokens += len(hits)
        exact, first = exact + (bool(hits) and all(hits)), first + (bool(hits) and hits[0])
    assert int(got.tokens) == tokens and int(got.exact) == exact and int(got.first) == first
    np.testing.assert_allclose(got.loss, loss, rtol=1e-5)


def test_chunks_change_neither_loss_nor_gradient_and_hold_one_chunk_of_logits():
    hidden = jax.random.normal(jax.random.key(1), (50, 8))
    labels = jax.random.randint(jax.random.key(2), (50,), 0, VOCAB)
    kernel = PARAMS["out"]["kernel"]

    def total(chunk):
        return jax.value_and_grad(lambda w: chunked_sums(lambda h: h @ w, hidden, labels, chunk)[0].sum())

    whole, parts = total(50)(kernel), total(16)(kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), whole, parts)
    assert f"50,{VOCAB}" in str(jax.make_jaxpr(total(50))(kernel))
    text = str(jax.make_jaxpr(total(16))(kernel))
    # neither all labels at once nor the chunks' logits stacked as residuals of the scan
    assert f"16,{VOCAB}]" in text and f"50,{VOCAB}]" not in text and f"4,16,{VOCAB}]" not in text


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.01)])
def test_the_loss_of_labels_is_the_formula_and_its_gradient_autodiff_s(smoothing, z_loss):
    logits = 3 * jax.random.normal(jax.random.key(1), (6, VOCAB))
    labels, ct = jnp.arange(6), jnp.arange(1.0, 7.0)

    def plain(logits):
        soft = optax.smooth_labels(jax.nn.one_hot(labels, VOCAB), smoothing)
        return optax.softmax_cross_entropy(logits, soft) + z_loss * jax.nn.logsumexp(logits, -1) ** 2

    want, pull = jax.vjp(plain, logits)
    got, pull_ours = jax.vjp(lambda x: label_loss(x, labels, smoothing, z_loss), logits)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(pull_ours(ct)[0], pull(ct)[0], atol=2e-6)


def test_the_compiled_loss_holds_one_array_of_a_chunk_s_logits():
    labels, width, vocab = 512, 16, 20_000
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)

    def bytes_of(chunk):
        total = lambda h, w, y: chunked_sums(lambda x: x @ w, h, y, chunk)[0].sum()
        step = jax.jit(jax.value_and_grad(total, (0, 1)))
        lowered = step.lower(shape(labels, width), shape(width, vocab), shape(labels, dtype=jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    kernel = 4 * width * vocab  # the gradient of the head is summed over chunks
    assert bytes_of(labels) < 1.1 * 4 * labels * vocab
    assert bytes_of(128) < 1.1 * 4 * 128 * vocab + 2 * kernel


def test_accumulated_step_equals_the_big_batch():
    tx = make_optimiser(OptimiserConfig(warmup=0), 10)
    big = source(seed=3, steps=4)[0]
    small = source(seed=3, steps=4, batch=2, accumulate=4)[0]
    one, (a, _) = make_train_step(sums_fn, tx)(init_state(PARAMS, tx), None, big)
    two, (b, _) = make_train_step(sums_fn, tx, accumulate=4)(init_state(PARAMS, tx), None, small)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one.trained, two.trained)
    assert not np.allclose(one.trained["out"]["kernel"], PARAMS["out"]["kernel"])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule(schedule):
    lr = make_schedule(OptimiserConfig(learning_rate=1.0, schedule=schedule, warmup=4), 20)
    assert 0 < lr(0) < lr(3) < lr(4) == 1.0
    assert lr(20) == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-6)


def test_a_resumed_run_is_bit_identical(tmp_path):
    tx = make_optimiser(OptimiserConfig(learning_rate=0.05), 20)
    step = make_train_step(sums_fn, tx)
    straight = fit(step, init_state(PARAMS, tx), None, source(seed=1, steps=20).iterator(), steps=20)
    before = Checkpoints(tmp_path, {"rank": 4})

    def die(record):
        if record["step"] == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batches = source(seed=1, steps=20).iterator()
        fit(step, init_state(PARAMS, tx), None, batches, steps=20, checkpoints=before, save_every=5, log=die)
    before.close()

    after = Checkpoints(tmp_path, {"rank": 4})
    state, position = after.restore(init_state(PARAMS, tx))
    assert int(state.step) == 10
    batches = source(seed=1, steps=20).iterator()
    batches.set_state(position)
    resumed = fit(step, state, None, batches, steps=20)
    after.close()
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)

    other = Checkpoints(tmp_path, {"rank": 8})
    with pytest.raises(ValueError, match="rank: 4 -> 8"):
        other.restore(init_state(PARAMS, tx))
    other.close()


def test_sigterm_saves_and_exits_143(tmp_path):
    import os
    import signal

    tx = optax.sgd(0.1)
    saved = Checkpoints(tmp_path, {})
    kill = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == 7 else None
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        batches = source(seed=1, steps=20).iterator()
        fit(make_train_step(sums_fn, tx), init_state(PARAMS, tx), None, batches, steps=20, checkpoints=saved, log=kill)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    again = Checkpoints(tmp_path, {})
    assert again.manager.latest_step() == 7
    again.close()


def test_a_loss_that_is_not_finite_stops_the_run():
    tx = optax.sgd(1.0)
    broken = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    with pytest.raises(FloatingPointError, match="at step 1"):
        batches = source(seed=1, steps=5).iterator()
        fit(make_train_step(sums_fn, tx), init_state(broken, tx), None, batches, steps=5)


def test_evaluate_does_not_depend_on_the_batch_size():
    step = make_eval_step(sums_fn)
    one, two = (evaluate(step, PARAMS, None, source(batch=b).iterator()) for b in (8, 5))
    assert one["examples"] == 24 and one == pytest.approx(two, rel=1e-5)


def test_metrics_drop_what_a_resumed_run_repeats(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    for n in range(1, 6):
        metrics.write("train", {"step": n})
    resumed = Metrics(tmp_path / "m.jsonl", resume_at=3)
    resumed.write("train", {"step": 4})
    assert [r["step"] for r in resumed.read()] == [1, 2, 3, 4]


def test_progress_off_a_terminal_is_plain_lines(capsys):
    with Reporter(20, label="train") as reporter:
        for n in range(1, 21):
            reporter.update(n, "loss 1.0")
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and err[0].startswith("train 10/20  loss 1.0  0:0") and err[0].endswith("left")


def test_neftune_adds_the_noise_it_says_to_word_embeddings_only_with_a_key():
    from jlora.models.llama import Llama, LlamaConfig
    from jlora.train.loss import noisy

    model = Llama(LlamaConfig(VOCAB, 32, 48, 2, 4, 2, 8))
    tokens, mask = jnp.ones((2, 6), jnp.int32), jnp.arange(6) < jnp.array([[6], [3]])
    params = model.init(jax.random.key(0), tokens)["params"]
    seen = {}

    def catch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.name == "embed_tokens" and context.method_name == "__call__":
            seen["x"] = out
        return out

    def embedded(alpha, key):
        with nn.intercept_methods(catch), noisy(alpha, key, mask):
            model.apply({"params": params}, tokens, method="hidden")
        return seen.pop("x")

    batch = source()[0]
    sums = answer_sums(model, neftune=50.0)
    plain, again = (float(sums(params, batch, key).loss) for key in (None, jax.random.key(1)))
    assert plain == float(answer_sums(model)(params, batch).loss) != again
    # interceptors nest outside in, so `catch` sees what `noisy` made
    clean, dirty = embedded(0.0, None), embedded(8.0, jax.random.key(1))
    size = jnp.abs(dirty - clean).max(axis=(1, 2))
    np.testing.assert_allclose(size, 8 / np.sqrt(32 * np.array([6, 3])), rtol=0.05)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_every_optimiser_lowers_the_loss_of_stacked_factors(name):
    tx = make_optimiser(OptimiserConfig(0.01, optimiser=name, schedule="constant", warmup=0), 10)
    goal = jax.random.normal(jax.random.key(0), (3, 4, 2))
    loss = lambda x: jnp.mean((x["stack"] - goal) ** 2) + jnp.mean((x["bias"] - 1) ** 2)
    x = {"stack": jnp.zeros((3, 4, 2)), "bias": jnp.zeros(5)}
    state, before = tx.init(x), float(loss(x))
    for _ in range(10):
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        x = optax.apply_updates(x, updates)
    assert float(loss(x)) < before and float(jnp.abs(x["bias"]).max()) > 0


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_decay_is_scaled_by_the_learning_rate(name):
    tx = make_optimiser(OptimiserConfig(1e-3, optimiser=name, schedule="constant", warmup=0, weight_decay=0.1), 10)
    x = {"w": jnp.ones((4, 2))}
    state = tx.init(x)
    for _ in range(10):
        updates, state = tx.update({"w": jnp.zeros((4, 2))}, state, x)
        x = optax.apply_updates(x, updates)
    decayed = 1 - 10 * 1e-4
    np.testing.assert_allclose(x["w"], decayed if name != "sgd" else x["w"][0, 0], atol=1e-5)
    assert decayed - 0.01 < float(x["w"][0, 0]) < 1


def test_muon_makes_each_matrix_of_a_stack_orthogonal_by_itself():
    tx = make_optimiser(OptimiserConfig(1.0, optimiser="muon", schedule="constant", warmup=0, clip=0.0), 10)
    x = {"stack": jnp.zeros((3, 8, 2))}
    grads = {"stack": jax.random.normal(jax.random.key(0), (3, 8, 2)) * jnp.array([1.0, 100.0, 1e4])[:, None, None]}
    updates, _ = tx.update(grads, tx.init(x), x)
    spectra = np.linalg.svd(np.asarray(updates["stack"]), compute_uv=False)
    scale = spectra / spectra.mean()
    assert scale.min() > 0.5 and scale.max() < 1.5


def test_a_run_goes_on_with_another_clip_and_other_arrays_are_told_from_damage(tmp_path):
    tx = lambda **settings: make_optimiser(OptimiserConfig(**settings), 10)
    saved = Checkpoints(tmp_path, {})
    saved.save(init_state(PARAMS, tx(clip=1.0)), {})
    saved.close()
    other = Checkpoints(tmp_path, {})
    for settings in ({"clip": 0.0}, {"clip": 2.0, "weight_decay": 0.1, "schedule": "constant", "warmup": 0}):
        assert other.restore(init_state(PARAMS, tx(**settings))) is not None
    with pytest.raises(ValueError, match=r"/0 holds other arrays than this run has \(.*\): resume with"):
        other.restore(init_state(PARAMS, tx(optimiser="lion")))
    other.close()


@pytest.mark.parametrize("wrong", [PermissionError(13, "denied"), ValueError("UNAVAILABLE: network"), MemoryError()])
def test_what_may_be_whole_is_not_called_damaged(wrong, tmp_path, monkeypatch):
    tx = optax.sgd(0.1)
    saved = Checkpoints(tmp_path, {})
    saved.save(init_state(PARAMS, tx), {})
    saved.manager.wait_until_finished()

    def fails(*_, **options):
        raise wrong

    monkeypatch.setattr(saved.manager, "restore", fails)
    with pytest.raises(ValueError, match=f"/0: this checkpoint cannot be read \\({type(wrong).__name__}"):
        saved.restore(init_state(PARAMS, tx))
    saved.close()


def test_force_allows_what_it_names_and_no_more(tmp_path):
    tx = optax.sgd(0.1)
    saved = Checkpoints(tmp_path, {"rank": 4, "rate": 1.0})
    saved.save(init_state(PARAMS, tx), {})
    saved.close()
    other = Checkpoints(tmp_path, {"rank": 4, "rate": 2.0})
    with pytest.raises(ValueError, match=r"rate: 1.0 -> 2.0"):
        other.restore(init_state(PARAMS, tx))
    assert other.restore(init_state(PARAMS, tx), allow=["rate"]) is not None
    other.close()
    other = Checkpoints(tmp_path, {"rank": 8, "rate": 2.0})
    with pytest.raises(ValueError, match="rank: 4 -> 8"):
        other.restore(init_state(PARAMS, tx), allow=["rate"])
    other.close()


def test_what_a_record_does_not_say_was_the_default(tmp_path):
    tx = optax.sgd(0.1)
    saved = Checkpoints(tmp_path, {"rank": 4})
    saved.save(init_state(PARAMS, tx), {})
    saved.close()
    again = Checkpoints(tmp_path, {"rank": 4, "newer": 1}, defaults={"newer": 1})
    assert again.restore(init_state(PARAMS, tx)) is not None
    again.close()
    other = Checkpoints(tmp_path, {"rank": 4, "newer": 2}, defaults={"newer": 1})
    with pytest.raises(ValueError, match="newer: 1 -> 2"):
        other.restore(init_state(PARAMS, tx))
    other.close()
