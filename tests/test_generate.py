"""Generation equals transformers' token by token; what is drawn obeys its truncation; streams equal batches."""

from __future__ import annotations

import dataclasses
import io
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import jlora
from jlora.beam import beam_search
from jlora.cli import main
from jlora.commands import generate as commands
from jlora.data import Row, tokenise
from jlora.generate import GenerateConfig, generate, generate_text, pad_left, run, start, stream
from jlora.methods.columns import Prefixed
from jlora.models.bert import Bert, BertConfig
from jlora.models.llama import Llama, LlamaConfig
from jlora.sampling import forbid, truncate
from jlora.serve.engine import Engine
from jlora.serve.schema import prompt_tokens
from tests.small import tokenizer

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [[5, 6, 7], [3, 9, 11, 4, 8, 8, 2], [12], [7, 7, 7, 7]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    # large weights: distributions with clear winners, unlike those of a fresh initialisation
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, initializer_range=0.4)).eval()
    folder = tmp_path_factory.mktemp("generate")
    theirs.save_pretrained(folder)
    from jlora.io import load

    return theirs, load(str(folder))


def theirs_of(model, prompt, **options):
    import torch

    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=[0, 1], pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
        ({"beams": 4}, {"num_beams": 4}),
        ({"beams": 3, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": 2.0}),
        ({"beams": 3, "length_penalty": -1.0}, {"num_beams": 3, "length_penalty": -1.0}),
        (
            {"beams": 10, "length_penalty": 0.9, "no_repeat_ngram": 4},
            {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4},
        ),
    ],
    ids=str,
)
def test_tokens_equal_transformers(pair, ours, theirs):
    torch_model, base = pair
    config = GenerateConfig(max_new_tokens=20, end=(0, 1), **ours)
    got = generate(base.model, base.params, *pad_left(PROMPTS, 8), config)
    assert got == [theirs_of(torch_model, prompt, **theirs) for prompt in PROMPTS]
    if not ours:
        assert len({len(row) for row in got}) > 1  # some rows ended by themselves, some at the limit


def small():
    config = LlamaConfig(15, 32, 48, 2, 4, 2, 8)
    model = Llama(config)
    params = model.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: 6 * x if x.ndim > 2 else x, params)


def test_truncations_keep_what_they_say():
    scores = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.07, 0.03]]))
    kept = lambda **options: np.isfinite(truncate(scores, GenerateConfig(**options)))[0].tolist()
    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_p=0.8) == [True, True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False, False]
    assert kept(min_p=0.2) == [True, True, True, False, False]
    assert kept() == [True] * 5


def test_draws_follow_the_distribution():
    model, params = small()
    tokens, mask = pad_left([[4, 5]] * 2000, 2)
    config = GenerateConfig(max_new_tokens=1, temperature=2.0, top_k=3)
    new = np.array(generate(model, params, tokens, mask, config, jax.random.key(0)))[:, 0]
    logits = model.apply({"params": params}, tokens[:1])[0, -1] / 2.0
    best = np.argsort(-logits)[:3]
    want = np.asarray(jax.nn.softmax(logits[best]))
    assert set(new) <= set(best.tolist())
    np.testing.assert_allclose([(new == token).mean() for token in best], want, atol=0.04)


def test_padding_is_no_repetition():
    tokens, mask = pad_left([[4, 5]], 8)
    scores = forbid(jnp.zeros((1, 9)), jnp.asarray(tokens), jnp.asarray(mask), 8, GenerateConfig(no_repeat_ngram=1))
    assert np.flatnonzero(~np.isfinite(scores[0])).tolist() == [4, 5]


def test_an_adapted_model_generates_as_its_merged_one_and_a_swap_compiles_nothing():
    model, params = small()
    config = GenerateConfig(max_new_tokens=12)
    frozen, lora = jlora.lorafy(
        params, 2, layouts=jlora.layouts(model.apply, {"params": params}, jnp.zeros((1, 3), int))
    )
    seen = set()
    prompts = pad_left([[4, 5], [6]], 4)
    compiled = None
    for seed in range(3):
        leaves, treedef = jax.tree.flatten(lora)
        new = [0.5 * jax.random.normal(jax.random.key(seed * 99 + n), x.shape) for n, x in enumerate(leaves)]
        adapter = jax.tree.unflatten(treedef, new)
        got = generate(model, jlora.combine(frozen, adapter), *prompts, config)
        assert compiled is None or run._cache_size() == compiled
        assert got == generate(model, jlora.merge(frozen, adapter), *prompts, config)
        compiled = run._cache_size()
        seen.add(str(got))
    assert len(seen) == 3


def test_a_stream_adds_up_to_the_text_and_stops_at_a_string():
    model, params = small()
    words = tokenizer()
    config = GenerateConfig(max_new_tokens=16, end=(0,))
    (whole,) = generate_text(model, params, words, ["good film"], config)
    prompt = words("good film")["input_ids"]
    pieces = list(stream(model, params, words, prompt, config))
    assert "".join(pieces) == whole and len(pieces) > 3
    stop = whole.split()[3]
    first = whole.index(stop)
    assert generate_text(model, params, words, ["good film"], config, stop=[stop]) == [whole[:first]]


def test_equal_prompts_are_drawn_each_by_itself():
    model, params = small()
    config = GenerateConfig(max_new_tokens=16, temperature=1.0)
    options = {"stop": ["never written"], "key": jax.random.key(0)}
    one, two = generate_text(model, params, tokenizer(), ["good film"] * 2, config, **options)
    assert one != two
    assert generate_text(model, params, tokenizer(), ["good film"] * 2, config, **options) == [one, two]
    with pytest.raises(ValueError, match="needs key="):
        generate_text(model, params, tokenizer(), ["good film"], config, stop=["x"])


def test_every_way_to_write_begins_a_prompt_as_training_does(monkeypatch):
    words, asked = tokenizer(), []
    words.bos_token = "<unk>"
    begins = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    words.backend_tokenizer.post_processor = begins  # and no `add_bos_token`: Llama 3's is made so
    trained = tokenise(Row("good film", " fine"), words).prompt.tolist()
    assert trained == [0, 5, 9]

    def wrote(model, params, tokens, mask, *_):
        asked.extend(row[real].tolist() for row, real in zip(tokens, mask, strict=True))
        return [[5]] * len(tokens)

    def streamed(model, params, tokenizer, prompt, *_, **options):
        asked.append(list(prompt))
        yield "good"

    monkeypatch.setattr("jlora.generate.generate", wrote)
    assert generate_text(None, None, words, ["good film", [5]], GenerateConfig()) == ["good", "good"]
    monkeypatch.setattr(commands, "stream", streamed)
    monkeypatch.setattr(
        commands,
        "ready",
        lambda config: (types.SimpleNamespace(tokenizer=words, model=None, source="m", ends=()), None),
    )
    command = commands.GenerateCommand("m", prompts=("good film",), raw=True)
    commands.generate_command(command)
    commands.generate_command(dataclasses.replace(command, prompts=("good film",) * 2))
    assert prompt_tokens({"prompt": "good film"}, words, False, 15) == trained
    assert asked == [trained, [5], *[trained] * 3]
    asked.clear()
    chat = [1, 13, 4, 5, 9, 2, 1, 14, 4]  # the template has no begin token, nor has training
    commands.generate_command(dataclasses.replace(command, raw=False))
    commands.generate_command(dataclasses.replace(command, raw=False, prompts=("good film",) * 2))
    said = {"messages": [{"role": "user", "content": "good film"}]}
    assert asked == [chat] * 3 and prompt_tokens(said, words, True, 15) == chat


def test_the_command_s_json_input_and_refusals(monkeypatch, capsys):
    asked = []
    base = types.SimpleNamespace(tokenizer=tokenizer(), model=None, source="m", ends=())
    monkeypatch.setattr(commands, "prompt_ids", lambda tokenizer, text: asked.append(text))
    monkeypatch.setattr(commands, "generate_text", lambda *_, **__: ["good"])
    monkeypatch.setattr(commands, "stream", lambda *_, **__: iter(["good"]))
    monkeypatch.setattr(commands, "ready", lambda config: (base, None))
    words = ["generate", "--model", "m", "--raw"]
    for given, text in ((["--json"], '{"answers": ["good"]}\n'), ([], "good\n")):
        main([*words, *given, "good film"])
        assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdin", io.StringIO("good\n\n"))
    main([*words, "--json"])
    assert asked == ["good film", "good film", "good\n"]
    refused = {
        "raw takes none": ["--system", "be good"],
        "seed = .* out of any range": ["--seed", "9" * 20],
        "length_penalty = nan": ["--length-penalty", "nan", "--beams", "2"],
        "stop = '': it ends every answer": ["--stop", "", "--"],
        "prompt 1 holds half a character": ["\udcff film"],
    }
    for sentence, given in refused.items():
        with pytest.raises(SystemExit, match="1"):
            main([*words, *given, "good"])
        assert re.search(sentence, capsys.readouterr().err)
    base.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="system is a message of a chat template, and m has none"):
        commands.generate_command(commands.GenerateCommand("m", prompts=("good",), system="be good"))


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"beams": 0}, {"temperature": -1.0}, {"max_new_tokens": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .* out of its range"):
        GenerateConfig(**wrong)


def test_an_encoder_writes_nothing(monkeypatch):
    encoder = Bert(BertConfig(15, 32, 48, 2, 4))
    base = types.SimpleNamespace(model=encoder, tokenizer=tokenizer(), source="bert", config=encoder.config)
    monkeypatch.setattr(commands, "load", lambda *_, **__: base)
    ways = [
        lambda: generate_text(encoder, None, tokenizer(), ["good"], GenerateConfig()),
        lambda: list(stream(Prefixed(encoder, 3, 0, 1), None, tokenizer(), [5], GenerateConfig())),
        lambda: commands.generate_command(commands.GenerateCommand("bert", prompts=("good",))),
        lambda: Engine(base),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="is an encoder: it writes no text"):
            way()


def test_what_is_missing_is_said():
    model, params = small()
    with pytest.raises(ValueError, match="needs key="):
        generate(model, params, *pad_left([[1]]), GenerateConfig(temperature=1.0))
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, params, [[1, 0]], [[True, False]], GenerateConfig())
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        pad_left([[1], []])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_long_prompt_is_read_in_blocks(beams):
    model, params = small()
    tokens = np.random.default_rng(0).integers(2, 15, (2, 600))
    mask = np.ones(tokens.shape, bool)
    mask[1, :70] = False
    config = GenerateConfig(max_new_tokens=3, beams=beams)
    new = generate(model, params, tokens, mask, config)
    if beams == 1:
        for n, answer in enumerate(new):  # each by the whole row read at once
            row = [*tokens[n][mask[n]], *answer[:-1]]
            best = jnp.argmax(model.apply({"params": params}, jnp.asarray([row])), -1)
            assert best[0, -len(answer) :].tolist() == answer
    size = 1 << 13
    shape = jax.ShapeDtypeStruct((1, size), jnp.int32)
    one = lambda p, t, m: start(model, 4, p, t, m, jax.random.key(0)).logits
    many = lambda p, t, m: beam_search(model, config, p, t, m)
    program = jax.jit(one if beams == 1 else many).lower(params, shape, jax.ShapeDtypeStruct((1, size), bool)).compile()
    assert program.memory_analysis().temp_size_in_bytes < size * size  # the scores of one head would be four times that
