"""Requests that share a running batch get what each would get alone, whatever comes and goes beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.sampling import truncate
from jlora.serve import slots as slots_module
from jlora.serve.engine import Engine, QueueFull
from jlora.serve.sample import Sampling, draw
from tests.serve.parts import NAMES, PROMPTS, Asked, made, offline, until


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    base, folder = made(tmp_path_factory.mktemp("served"))
    engine = Engine(base, slots=3, max_length=64, queue=20, adapters=4, smallest=4).start()
    for name in NAMES:
        engine.load(name, folder / name).result()
    yield base, folder, engine
    engine.stop()
    assert not engine.thread.is_alive()


def test_mixed_requests_are_each_as_offline(served):
    base, folder, engine = served
    cases = [(prompt, name, 3 + 4 * n) for n, prompt in enumerate(PROMPTS) for name in (None, *NAMES)]
    asked = [Asked(engine, prompt, name, max_tokens=count) for prompt, name, count in cases]
    different = set()
    for one, (prompt, name, count) in zip(asked, cases, strict=True):
        text, finish = one.wait()
        want = offline(base, folder / name if name else None, prompt, count)
        assert one.request.new == want, (prompt, name)
        assert text == base.tokenizer.decode(want, skip_special_tokens=True)
        assert finish == ("stop" if want[-1] == base.tokenizer.eos_token_id else "length")
        different.add(tuple(want[:3]))
    assert len(different) > 5


def test_nothing_is_compiled_again(served):
    _, folder, engine = served
    Asked(engine, (5, 6, 7), "film", max_tokens=4).wait()
    before = slots_module.decode._cache_size(), slots_module.prefill._cache_size()
    engine.load("film", folder / "tweets").result()
    engine.unload("news").result()
    engine.load("news", folder / "news").result()
    for name in ("film", None, "news"):
        Asked(engine, (5, 8, 7), name, max_tokens=4, temperature=0.7, seed=3).wait()
    engine.load("film", folder / "film").result()
    assert (slots_module.decode._cache_size(), slots_module.prefill._cache_size()) == before


def test_a_running_request_keeps_its_adapter(served):
    base, folder, engine = served
    old = [Asked(engine, (5, 6, 7), "film", max_tokens=40, ignore_eos=True) for _ in range(3)]
    until(lambda: all(one.request.new for one in old))
    engine.load("film", folder / "news").result()
    new = Asked(engine, (5, 6, 7), "film", max_tokens=40)
    engine.unload("tweets").result()
    new.wait()
    for one in old:
        one.wait()
        assert one.request.new == offline(base, folder / "film", (5, 6, 7), 40, ignore_eos=True)
    assert new.request.new == offline(base, folder / "news", (5, 6, 7), 40)
    engine.load("film", folder / "film").result()
    engine.load("tweets", folder / "tweets").result()


def test_cancelling_and_running_out_of_time_free_the_slot(served):
    _, _, engine = served
    long = {"max_tokens": 60, "ignore_eos": True}
    first, late, other = (Asked(engine, (5,), "film", timeout, **long) for timeout in (60, 0.0, 60))
    assert late.wait()[1] == "timeout"
    engine.cancel(first.request)
    assert first.wait()[1] in ("cancelled", "length")
    assert other.wait()[1] == "length" and len(other.request.new) == 60
    until(lambda: not any(engine.running))
    assert not engine.shelf.bank.pins


def test_stop_strings_and_limits(served):
    base, folder, engine = served
    prompt = (5, 6, 7)
    want = base.tokenizer.decode(offline(base, folder / "news", prompt, 12), skip_special_tokens=True)
    word = want.split()[2]
    assert Asked(engine, prompt, "news", max_tokens=12, stop=(word,)).wait() == (want[: want.index(word)], "stop")
    with pytest.raises(ValueError, match="more than the 64"):
        Asked(engine, prompt, max_tokens=62)
    with pytest.raises(ValueError, match="no tokens"):
        Asked(engine, ())
    with pytest.raises(QueueFull, match="20 requests wait"):
        for _ in range(60):
            Asked(engine, prompt, max_tokens=60, timeout=0.3, ignore_eos=True)
    until(lambda: not any(engine.running) and not engine.waiting)
    with pytest.raises(FileNotFoundError):
        engine.load("x", folder).result()
    with pytest.raises(KeyError):
        engine.unload("x").result()
    seeds = [Asked(engine, prompt, max_tokens=20, temperature=5.0, seed=seed, ignore_eos=True) for seed in (1, 1, 2)]
    a, b, c = (one.wait()[0] for one in seeds)
    assert a == b != c


def test_each_row_draws_under_its_own_truncation():
    logits = jax.random.normal(jax.random.key(0), (4, 30)) * 3
    settings = [(1.5, 3, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (2.0, 0, 1.0, 0.2), (0.0, 0, 1.0, 0.0)]
    columns = [jnp.asarray(column) for column in zip(*settings, strict=True)]
    run = jax.jit(lambda seed: draw(logits, Sampling(*columns, jnp.full(4, seed, jnp.uint32)), jnp.zeros(4, jnp.int32)))
    drawn = np.stack([run(seed) for seed in range(400)])

    class Settings:
        def __init__(self, temperature, top_k, top_p, min_p):
            self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p

    for row, how in enumerate(settings[:3]):
        scores = truncate(logits[row : row + 1] / how[0], Settings(*how))[0]
        probs = np.asarray(jax.nn.softmax(scores))
        counts = np.bincount(drawn[:, row], minlength=30) / 400
        assert not counts[probs == 0].any()
        assert np.abs(counts - probs).max() < 0.1
    assert (drawn[:, 3] == int(jnp.argmax(logits[3]))).all()
