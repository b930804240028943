"""Requests that share a running batch get what each would get alone, whatever comes and goes beside them."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jlora.bank import AdapterBank
from jlora.io.adapters import load_adapter
from jlora.models.gpt2 import GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.sampling import truncate
from jlora.serve import batch as batch_module
from jlora.serve import slots as slots_module
from jlora.serve.alone import Alone
from jlora.serve.engine import Engine, QueueFull
from jlora.serve.request import Ask, Request
from jlora.serve.sample import Sampling, draw, sampling
from tests.serve.parts import NAMES, PROMPTS, Asked, offline
from tests.wait import until


@pytest.fixture(scope="module")
def served(place):
    base, folder = place
    engine = Engine(base, slots=3, max_length=64, queue=20, adapters=4, smallest=16, merge_after=0).start()
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

    def ask():
        for name in ("film", None, "news"):
            Asked(engine, (5, 8, 7), name, max_tokens=4, temperature=0.7, seed=3, ignore_eos=True).wait()

    ask()
    compiled = lambda: [getattr(slots_module, name)._cache_size() for name in ("decode", "prefill", "seat", "resized")]
    before = compiled()
    engine.load("film", folder / "tweets").result()
    engine.unload("news").result()
    engine.load("news", folder / "news").result()
    ask()
    engine.load("film", folder / "film").result()
    assert compiled() == before


def test_layers_that_are_not_scanned_keep_their_cache_each_for_itself():
    model = Llama(LlamaConfig(15, 32, 48, 3, 4, 2, 8), scan_layers=False)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    state, bank = slots_module.empty(model, 2, 16), jax.tree.map(lambda _: None, params)
    rows, how = jnp.zeros(2, jnp.int32), sampling([Ask((0,))] * 2)
    step = slots_module.decode.lower(model, 1, params, bank, state, rows == 0, rows, how).compile()
    assert state.cache["kv"][0][0].shape == (2, 2, 16, 8)
    assert not re.search(r"f32\[3,2,(1,)*2,(1,)*16,8\]", step.as_text())  # joined and cut again


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


def test_a_stretch_of_one_adapter_runs_on_merged_weights(place):
    base, folder = place
    held = jax.device_get(base.params)
    engine = Engine(base, slots=3, max_length=64, queue=20, adapters=4, smallest=64, merge_after=5)
    plain, asked, weights = [], [], engine.batch.alone.weights

    def ask(prompt, name, where):
        asked.append((Asked(engine, prompt, name, max_tokens=45, ignore_eos=True), where, prompt))

    def watched(adapters):
        found = weights(adapters)
        plain.append(found[1] is engine.batch.alone.no_bank)
        if plain[-1] and len(asked) == 2:  # it has just been merged: others come
            ask(PROMPTS[0], "news", "news")
            ask(PROMPTS[2], None, None)
        return found

    def right(one, where, prompt):
        one.wait()
        return one.request.new == offline(base, folder / where if where else None, prompt, 45, ignore_eos=True)

    engine.batch.alone.weights = watched
    engine.start()
    try:
        for name in ("film", "news"):
            engine.load(name, folder / name).result()
        compiled = slots_module.decode._cache_size()
        for prompt in PROMPTS[:2]:
            ask(prompt, "film", "film")
        assert all(right(*one) for one in asked[:2]) and len(asked) == 4 and all(right(*one) for one in asked[2:])
        first = plain.index(True)
        assert False in plain[first:] and engine.counts["merges"]
        merges = engine.counts["merges"]
        engine.load("film", folder / "tweets").result()
        ask(PROMPTS[1], "film", "tweets")
        assert right(*asked[-1]) and plain[-1] and engine.counts["merges"] == merges + 1
        ask(PROMPTS[1], None, None)
        assert right(*asked[-1])
        assert engine.batch.alone.plain is base.params
        assert slots_module.decode._cache_size() <= compiled + 2
        assert jax.tree.all(jax.tree.map(np.array_equal, held, jax.device_get(base.params)))
    finally:
        engine.stop()


def test_weights_of_less_than_float32_are_not_merged(place):
    base, folder = place
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params)
    bank = AdapterBank(half, capacity=1)
    bank.add("film", load_adapter(base, folder / "film")[1])
    alone = Alone(half, bank, 1)
    assert not alone.stepped(["film", "film"]) and alone.weights(["film"])[0] is half
    exact = Alone(base.params, bank, 2)
    assert [exact.stepped(names) for names in (["film"], [None], ["film", None], ["film"], ["film"])] == [False] * 4 + [
        True
    ]


def test_cancelling_and_running_out_of_time_free_the_slot(served):
    _, _, engine = served
    long = {"max_tokens": 60, "ignore_eos": True}
    first, late, other = (Asked(engine, (5,), "film", timeout, **long) for timeout in (60, 0.0, 60))
    assert late.wait()[1] == "timeout"
    engine.cancel(first.request)
    assert first.wait()[1] in ("cancelled", "length")
    assert other.wait()[1] == "length" and len(other.request.new) == 60
    until(lambda: not engine.batch.running)
    assert not engine.shelf.bank.pins


def test_an_adapter_that_gets_no_memory_ends_its_own_request_alone(served, monkeypatch):
    base, folder, engine = served

    def short(held, lora):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n\x1b[2J")

    engine.load("late", folder / "tweets").result()
    with monkeypatch.context() as patch:
        patch.setattr(engine.shelf.bank, "add", short)
        refused, other = Asked(engine, (5, 6, 7), "late"), Asked(engine, (5, 6, 7), max_tokens=4)
        event = refused.events.get(timeout=600)
        assert event.finish == "error" and "'late' did not get into memory" in event.message
        assert "RuntimeError: RESOURCE_EXHAUSTED: Out of memory" in event.message and event.message.isprintable()
        other.wait()
        assert other.request.new == offline(base, None, (5, 6, 7), 4)
    late = Asked(engine, (5, 6, 7), "late", max_tokens=4)
    late.wait()
    assert late.request.new == offline(base, folder / "tweets", (5, 6, 7), 4)
    engine.unload("late").result()


def short(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_a_merge_that_gets_no_memory_leaves_the_factors(place, monkeypatch, caplog):
    base, folder = place
    engine = Engine(base, slots=2, max_length=64, smallest=16, adapters=3, merge_after=2)
    for name in ("film", "news"):
        engine.shelf.put(name, folder / name)
    real, merged = engine.shelf.bank.merged, []

    def one(params, key):
        merged.append(key.name)
        return real(params, key) if len(merged) == 1 else short()

    monkeypatch.setattr(engine.shelf.bank, "merged", one)
    engine.start()
    try:
        for name in ("film", "news", "film"):  # merged, not merged, no longer merged
            asked = Asked(engine, (5, 6, 7), name, max_tokens=6, ignore_eos=True)
            assert asked.wait()[1] == "length"
            assert asked.request.new == offline(base, folder / name, (5, 6, 7), 6, ignore_eos=True)
        assert merged == ["film", "news"] and engine.counts["merges"] == 1
        assert "no adapter is merged from now on: RuntimeError: RESOURCE_EXHAUSTED" in caplog.text
    finally:
        engine.stop()


def test_prompts_that_get_no_memory_end_alone(served, monkeypatch):
    base, _, engine = served
    real = batch_module.prefill
    large = lambda model, params, bank, tokens, *rest: (
        short() if tokens.shape[1] > 16 else real(model, params, bank, tokens, *rest)
    )
    monkeypatch.setattr(batch_module, "prefill", large)
    other = Asked(engine, (5, 6, 7), max_tokens=50, ignore_eos=True)
    long = [Asked(engine, (5,) * 20, name, max_tokens=4) for name in (None, "film", "news")]
    for one in long:
        event = one.events.get(timeout=600)
        assert event.finish == "error"
        assert event.message == (
            "the prompt of 20 tokens was not read: RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
        )
    assert other.wait()[1] == "length"
    assert other.request.new == offline(base, None, (5, 6, 7), 50, ignore_eos=True)
    until(lambda: not engine.batch.running)
    assert not engine.shelf.bank.pins


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_the_thread_everybody_is_told(place, monkeypatch):
    engine = Engine(place[0], slots=1, max_length=64, smallest=16)
    given_up = engine.ask_thread(lambda: None)
    given_up.cancel()
    late = [engine.ask_thread(lambda: None) for _ in range(2)]

    def panic(adapter):
        late.extend(engine.ask_thread(lambda: None) for _ in range(2))
        late[2].cancel()
        raise KeyboardInterrupt("a panic")

    monkeypatch.setattr(engine.shelf, "pin", panic)
    asked = [Asked(engine, (5, 6, 7)) for _ in range(2)]
    engine.start()
    for one in asked:
        assert one.wait()[1] == "error"
    engine.thread.join(60)
    assert [one.cancelled() or one.exception() for one in late[:3]] == [None, None, True]
    for tell in (late[3].result, lambda: Asked(engine, (5,))):
        with pytest.raises(RuntimeError, match="the engine failed: KeyboardInterrupt: a panic"):
            tell()


def test_bursts_and_caches_that_grow_and_shrink_write_the_same(served):
    base, folder, _ = served
    engine = Engine(base, slots=2, max_length=64, smallest=16, together=2, burst=3).start()
    try:
        engine.load("film", folder / "film").result()
        sizes, fit = set(), engine.batch.fit
        engine.batch.fit = lambda need: (fit(need), sizes.add(engine.batch.size))
        cases = [
            ((5, 6, 7, 9, 11, 4, 8) * 2, "film", 50),
            ((12,), None, 3),
            ((7, 7, 7, 7, 9), None, 2),
            ((3, 9), "film", 5),
        ]
        asked = [Asked(engine, prompt, name, max_tokens=count, ignore_eos=True) for prompt, name, count in cases]
        for one, (prompt, name, count) in zip(asked, cases, strict=True):
            one.wait()
            assert one.request.new == offline(base, folder / name if name else None, prompt, count, ignore_eos=True)
        assert sizes == {16, 32, 64}
        last = Asked(engine, (5,), max_tokens=4, ignore_eos=True)
        last.wait()
        assert engine.batch.size == 16 and last.request.new == offline(base, None, (5,), 4, ignore_eos=True)
    finally:
        engine.stop()


def test_text_comes_as_the_whole_answers_would_be_decoded(served):
    class Bytes:
        """A token is a byte; special ones are left out."""

        def decode(self, tokens, skip_special_tokens):
            return bytes(token for token in tokens if token < 256).decode(errors="replace")

    said = "naïve — 日本 🎉!".encode()
    for tokenizer, tokens in ((Bytes(), [*said, 300, *b" end", 0xF0, 0x9F]), (served[0].tokenizer, [5, 2, 7, 2, 2, 8])):
        for stop in ((), ("本 ",), ("zzzz",)):
            pieces = []
            request = Request(Ask((1,), max_tokens=len(tokens), stop=stop, ignore_eos=True), pieces.append)
            for token in tokens:
                if request.take(token, tokenizer, frozenset([2]), False):
                    break
            whole = tokenizer.decode(tokens, skip_special_tokens=True)
            assert "".join(event.text for event in pieces) == whole.partition(stop[0] if stop else "\0")[0]
            assert pieces[-1].finish == ("stop" if stop and stop[0] in whole else "length")
            assert stop or len(pieces) > 2


def test_a_completion_goes_on_from_its_prompts_text():
    """With a decoder like Llama 2's, which drops the space before a text."""
    spaced = ["<s>", "\u2581The", "\u2581capital", "\u2581is", "\u2581Paris", ",", "\u2581and"]
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(spaced)}, unk_token="<s>"))
    words.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words.add_special_tokens(["<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    for before, said in (((1, 2, 3), " Paris, and"), ((0,), "Paris, and"), ((), "Paris, and")):
        pieces = []
        request = Request(Ask((0, 1, 2, 3), max_tokens=3, before=before, stop=("capital",)), pieces.append)
        assert [request.take(token, tokenizer, frozenset(), False) for token in (4, 5, 6)] == [False, False, True]
        assert "".join(event.text for event in pieces) == said
        assert pieces[-1].finish == "length" and request.new == [4, 5, 6]


def test_stop_strings_and_limits(served):
    base, folder, engine = served
    prompt = (5, 6, 7)
    want = base.tokenizer.decode(offline(base, folder / "news", prompt, 12, ignore_eos=True), skip_special_tokens=True)
    word = want.split()[2]
    assert Asked(engine, prompt, "news", max_tokens=12, stop=(word,), ignore_eos=True).wait() == (
        want[: want.index(word)],
        "stop",
    )
    with pytest.raises(ValueError, match="more than the 64"):
        Asked(engine, prompt, max_tokens=62)
    with pytest.raises(ValueError, match="no tokens"):
        Asked(engine, ())
    with pytest.raises(QueueFull, match="20 requests wait"):
        for _ in range(60):
            Asked(engine, prompt, max_tokens=60, timeout=0.3, ignore_eos=True)
    until(lambda: not engine.batch.running and not engine.waiting)
    with pytest.raises(FileNotFoundError):
        engine.load("x", folder).result()
    with pytest.raises(KeyError):
        engine.unload("x").result()
    seeds = [Asked(engine, prompt, max_tokens=20, temperature=5.0, seed=seed, ignore_eos=True) for seed in (1, 1, 2)]
    a, b, c = (one.wait()[0] for one in seeds)
    assert a == b != c


def test_a_cache_past_the_models_positions_is_refused(place):
    base = dataclasses.replace(place[0], config=GPT2Config(15, 48, 32, 2, 4))
    with pytest.raises(ValueError, match=r"has 48 positions.*set max_length to 48"):
        Engine(base, max_length=64)
    assert Engine(base, slots=1, max_length=48).max_length == 48


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
