"""What a task makes of rows and examples."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from jlora.commands.settings import TrainConfig, check
from jlora.commands.tasks import Answers, Labels, Pairs, task_of
from jlora.commands.written import prompts_of, questions
from jlora.data import DataError, Example, Row, packing, tokenise
from jlora.data.tokens import posed
from jlora.io import Pretrained
from tests.small import tokenizer

EXAMPLES = [Example(np.arange(5, dtype=np.int32), np.arange(5) > 2)] * 40


@pytest.mark.parametrize(("settings", "steps"), [({"steps": 7}, 7), ({"epochs": 3.0}, 15), ({}, 5)])
def test_a_run_s_examples_are_packed_once(settings, steps, monkeypatch):
    packed, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *args: packed.append(args) or pack(*args))
    config = TrainConfig("m", "d", packing=True, batch=2, max_length=20, **settings)
    source = Answers(config).planned(EXAMPLES)
    assert len(source) == steps and len(packed) == 1
    np.testing.assert_array_equal(source[1]["tokens"], Answers(config).training(EXAMPLES, steps)[1]["tokens"])


def test_only_a_prompt_or_a_chat_is_answered():
    rows = [Row(completion="text"), Row("ask", "answer"), Row(messages=({"role": "assistant", "content": "chat"},))]
    assert Answers(TrainConfig("m", "d")).asked(rows) == rows[1:]


def test_a_chat_is_asked_as_it_is_trained_on():
    words = tokenizer()
    words.bos_token = "Review"  # which the template does not write, and a plain prompt begins with
    begins = processors.TemplateProcessing(single="Review $A", special_tokens=[("Review", 3)])
    words.backend_tokenizer.post_processor = begins
    said = (("user", "bad", 1), ("assistant", "negative", 1), ("user", "good film", 1), ("assistant", "positive", 1))
    turns = tuple({"role": role, "content": text, "weight": weight} for role, text, weight in said)
    base = Pretrained(SimpleNamespace(), None, None, words, "m", [])
    for row, want in ((Row(messages=turns), "positive"), (Row(messages=turns[:2]), "negative")):
        asked, example = posed(row, words, base.ends), tokenise(row, words, base.ends)
        ((prompt, references),) = questions([asked], words).items()
        assert asked.prompt.endswith("<|im_start|> assistant : ") and references == [want]
        (tokens,) = prompts_of(base, [prompt], 4)
        assert tokens == example.tokens[:-2].tolist()  # less the answer's word and its end
    assert prompts_of(base, ["good"], 4) == [[3, 5]]
    unlearnt = Row(messages=(*turns[:3], {**turns[3], "weight": 0}))
    assert posed(unlearnt, words, base.ends).completion == "negative"
    with pytest.raises(ValueError, match="x:1: metrics of written answers need rows of prompt and completion, or of"):
        questions([Row(completion="text", where="x:1")])


def test_the_loss_of_classes_is_shaped_and_that_of_numbers_is_not(tmp_path):
    logits, ones = jnp.asarray([[2.0, 0.8, -1.3]]), jnp.ones((1, 1))
    head = SimpleNamespace(apply=lambda variables, *_, **__: variables["params"]["head"])
    base = Pretrained(head, None, None, None, "m", [])
    batch = {"tokens": ones, "mask": ones, "types": ones, "labels": ones[0], "weights": ones[0]}
    key, rows = jnp.zeros(2, jnp.uint32), [Row(text="t", label=n) for n in range(3)]

    def loss(**given):
        task = Labels(TrainConfig(str(tmp_path), "d", **given), rows)
        return float(task.objective(base)({"head": None}, {"head": logits}, batch, key).loss)

    log_z = float(jnp.log(jnp.sum(jnp.exp(logits))))
    assert loss(z_loss=0.1) - loss() == pytest.approx(0.1 * log_z**2, rel=1e-5)
    own, mean = 0.8, 0.5
    assert loss(label_smoothing=0.3) - loss() == pytest.approx(0.3 * (own - mean), rel=1e-5)
    for name in ("z_loss", "label_smoothing"):
        with pytest.raises(ValueError, match=f"{name} is of classes, and the labels of d are numbers"):
            Labels(TrainConfig(str(tmp_path), "d", labels="numbers", **{name: 0.1}), rows)

    third = rows + rows[1:2]  # four rows, of three classes, two of them of the second
    for given, weight in ((("1=3",), 3), (("0=5", "2=7"), 1), (("balanced",), 4 / (3 * 2))):
        task = Labels(TrainConfig(str(tmp_path), "d", class_weights=given), third)
        objective = task.objective(base)
        assert float(objective({"head": None}, {"head": logits}, batch, key).loss) == pytest.approx(weight * loss())
        assert float(objective({"head": None}, {"head": logits}, batch, None).loss) == pytest.approx(loss())
    for given, said in (
        (("4=1",), "'4=1' is not CLASS=WEIGHT of a class"),
        (("1=no",), "no weight"),
        (("1=0",), "no we"),
    ):
        with pytest.raises(ValueError, match=f"class_weights: .*{said}"):
            Labels(TrainConfig(str(tmp_path), "d", class_weights=given), rows)
    with pytest.raises(ValueError, match="class_weights are of labels, and the rows of d have none"):
        task_of(TrainConfig("m", "d", class_weights=("balanced",)), [Row("a", "b")])


def test_the_loss_may_be_of_the_prompt_too():
    base = SimpleNamespace(tokenizer=tokenizer(), ends=(), check=lambda length, token: None)
    turns = tuple({"role": role, "content": text} for role, text in (("user", "good"), ("assistant", "positive")))
    rows = [Row("Review : good", "positive"), Row(messages=turns)]
    for only, learnt in ((True, [2, 2]), (False, [5, 10])):
        task = Answers(TrainConfig("m", "d", completion_only_loss=only))
        assert [int(example.loss_mask.sum()) for example in task.examples(rows, base, "d")] == learnt
    with pytest.raises(ValueError, match="completion_only_loss is of answers, not of labels"):
        task_of(TrainConfig("m", "d", completion_only_loss=False), [Row(text="a", label=n) for n in range(2)])
    with pytest.raises(ValueError, match="completion_only_loss is of answers, and loss is dpo"):
        check(TrainConfig("m", "d", completion_only_loss=False, loss="dpo"))


def test_what_a_cut_leaves_nothing_to_learn_in_is_left_out(capsys):
    turns = lambda *said: tuple({"role": role, "content": text, "weight": n} for role, text, n in said)
    short = turns(("user", "good", 1), ("assistant", "positive", 1))
    long = (*short, *turns(("user", "film " * 30, 1), ("assistant", "fine", 0)))
    base = SimpleNamespace(tokenizer=tokenizer(), ends=(), check=lambda length, token: None)
    task, rows = Answers(TrainConfig("m", "d", max_length=16)), [Row(messages=short), Row(messages=long)]
    (example,) = task.examples(rows, base, "d")
    assert base.tokenizer.decode(example.tokens[example.loss_mask]) == "positive <|im_end|>"
    assert "d: 1 of 2 examples are left out: the cut leaves nothing to learn in them" in capsys.readouterr().err
    with pytest.raises(DataError, match="d: there is nothing to learn from its rows within max_length = 16"):
        task.examples(rows[1:], base, "d")
    pairs = [Row(messages=short, rejected_messages=other, given=1) for other in (short, long)]
    (pair,) = Pairs(TrainConfig("m", "d", loss="orpo", max_length=16)).examples(pairs, base, "d")
    assert [len(side.tokens) for side in pair] == [len(example.tokens)] * 2


@pytest.mark.parametrize("bos", [None, 3])
def test_both_sides_of_a_pair_are_cut_to_the_same_prompt(bos):
    words = tokenizer()
    words.bos_token = None if bos is None else words.decode([bos])
    base = SimpleNamespace(tokenizer=words, ends=(), check=lambda length, token: None)
    task = Pairs(TrainConfig("m", "d", loss="dpo", max_length=9))

    def cut(prompt, *answers):
        (pair,) = task.examples([Row(prompt, answers[0], rejected=answers[1])], base, "d")
        return [tuple(words.decode(part) for part in (side.prompt, side.tokens[side.loss_mask])) for side in pair]

    prompt, start = "Review : " + "film " * 20 + "good Sentiment :", "" if bos is None else "Review "
    kept = start + " ".join([*["film"] * 20, "good", "Sentiment", ":"][-4 + bool(bos) :])
    assert cut(prompt, "positive", "bad bad bad bad") == [
        (kept, "positive <|im_end|>"),
        (kept, "bad bad bad bad <|im_end|>"),
    ]
    assert task.cut == 1
    # an answer that leaves no room: the other one is whole, after one token
    first, second = cut(prompt, "bad " * 12, "positive")
    assert first[0] == start.strip() and second == (start.strip() or ":", "positive <|im_end|>")
    assert cut("Review : good", "positive", "negative") == [
        ("Review : good", f"{answer} <|im_end|>") for answer in ("positive", "negative")
    ]
