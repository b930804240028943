"""Tokens and batches: what carries the loss, which shapes occur, and that the order can be resumed."""

import itertools

import numpy as np
import pytest

from jlora.data import BatchSource, DataError, Example, Row, bucket_lengths, collate, tokenise, tokenise_rows
from jlora.data.tokens import prompt_ids


class CharTokenizer:
    """A character a token; end of turn is token 0. `begins`: it adds token 1, without a flag, as Llama 3's."""

    begins = False
    eos_token_id, bos_token_id, special_tokens_map = 0, 1, {}
    chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}${{ '\n' }}{% endfor %}"
        "{{ '<a>' if add_generation_prompt }}"
    )

    def __call__(self, text, add_special_tokens=True):
        first = [1] if self.begins and add_special_tokens else []
        return {"input_ids": first + [0 if c == "$" else ord(c) for c in text]}


def text_of(tokens):
    return "".join("$" if t == 0 else chr(t) for t in tokens)


def test_the_answer_and_its_end_carry_the_loss():
    example = tokenise(Row(prompt="ab", completion="cd"), CharTokenizer())
    assert text_of(example.tokens) == "abcd$" and text_of(example.tokens[example.loss_mask]) == "cd$"
    assert text_of(example.prompt) == "ab"


@pytest.mark.parametrize("prompt", ["ab", ""])
def test_an_answer_that_holds_its_end_gets_no_second_one(prompt):
    for answer, learnt in (("cd$", "cd$"), ("cd!", "cd!"), ("c$d", "c$d$"), ("cd", "cd$")):
        example = tokenise(Row(prompt, answer), CharTokenizer(), ends=(0, ord("!")))
        assert text_of(example.tokens[example.loss_mask]) == learnt
    assert text_of(tokenise(Row(prompt, "cd$"), CharTokenizer()).tokens[-3:]) == "cd$"


def test_a_prompt_begins_as_in_training_and_a_chat_as_its_template_says():
    words = CharTokenizer()
    assert prompt_ids(words, "ab") == [97, 98] and prompt_ids(words, "") == [1]
    words.begins = True
    assert prompt_ids(words, "ab") == [1, 97, 98] == list(tokenise(Row("ab", "cd"), words).prompt)
    assert prompt_ids(words, "\x01ab") == [1, 97, 98] and prompt_ids(words, "") == [1]
    assert tokenise(Row(messages=({"role": "assistant", "content": "a"},)), words).tokens[0] == ord("<")


def test_chat_masks_every_assistant_turn_and_nothing_else():
    turns = [("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")]
    row = Row(messages=tuple({"role": r, "content": c} for r, c in turns))
    example = tokenise(row, CharTokenizer())
    assert text_of(example.tokens) == "<s>s$\n<u>u$\n<a>one$\n<u>v$\n<a>two$"
    assert text_of(example.tokens[example.loss_mask]) == "one$two$"


def test_a_turn_ends_at_any_end_of_the_checkpoint():
    turns = [("user", "u"), ("assistant", "one!a"), ("user", "v"), ("assistant", "two")]
    row = Row(messages=tuple({"role": r, "content": c} for r, c in turns))
    ((example,), cut) = tokenise_rows([row], CharTokenizer(), 99, ends=(0, ord("!")))
    assert text_of(example.tokens[example.loss_mask]) == "one!two$" and not cut


def test_a_template_that_rewrites_the_past_is_an_error():
    class Rewriting(CharTokenizer):
        chat_template = "{{ messages|length }}" + CharTokenizer.chat_template

    with pytest.raises(DataError, match=r"x:3: key 'messages\[0\]'"):
        tokenise(Row(messages=({"role": "assistant", "content": "a"},), where="x:3"), Rewriting())


def test_a_cut_keeps_the_answer_and_is_counted():
    examples, cut = tokenise_rows(
        [Row(prompt="abcdef", completion="g"), Row(prompt="a", completion="b")], CharTokenizer(), 4
    )
    assert cut == 1 and text_of(examples[0].tokens) == "efg$" and text_of(examples[1].tokens) == "ab$"


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("most", [2, 3, 4, 5, 11, 12])
def test_a_long_text_is_taken_in_pieces_and_every_token_is_learnt_once(bos, most):
    words, text = CharTokenizer(), "abcdefghij"
    words.bos_token_id = bos
    whole = tokenise(Row(completion=text), words)
    found, cut = tokenise_rows([Row("ask", "b"), Row(completion=text)], words, most)
    assert cut == (most < 5) and len(found[0].tokens) == min(most, 5)
    learnt = np.concatenate([piece.tokens[1:][piece.loss_mask[1:]] for piece in found[1:]])
    np.testing.assert_array_equal(learnt, whole.tokens[1:])
    assert all(len(piece.tokens) == most for piece in found[1:-1])
    before = [int(whole.tokens[0]), *(bos or int(piece.tokens[-1]) for piece in found[1:-1])]
    assert [int(piece.tokens[0]) for piece in found[1:]] == before
    ((side,), cut) = tokenise_rows([Row(completion=text)], words, 4, single=True)
    assert len(side.tokens) == 4 and cut == 1


def test_a_cut_keeps_the_begin_token_and_learns_no_half_answer():
    words = CharTokenizer()
    words.begins = True
    ((example,), cut) = tokenise_rows([Row("abcdef", "gh")], words, 6)
    assert cut == 1 and example.tokens.tolist() == [1, ord("e"), ord("f"), ord("g"), ord("h"), 0]
    assert example.loss_mask.tolist() == [False] * 3 + [True] * 3
    turns = [("user", "u"), ("assistant", "12345"), ("user", "v"), ("assistant", "two")]
    row = Row(messages=tuple({"role": r, "content": c} for r, c in turns))
    ((example,), _) = tokenise_rows([row], CharTokenizer(), 17)
    assert text_of(example.tokens) == "45$\n<u>v$\n<a>two$"
    assert text_of(example.tokens[example.loss_mask]) == "two$"
    ((example,), _) = tokenise_rows([row], CharTokenizer(), 3)
    assert text_of(example.tokens[example.loss_mask]) == "wo$"


def test_a_turn_of_weight_0_is_not_learnt():
    turns = [("user", "u", 1), ("assistant", "no", 0), ("user", "v", 1), ("assistant", "yes", 1)]
    row = Row(messages=tuple({"role": r, "content": c} | ({} if w else {"weight": 0}) for r, c, w in turns))
    example = tokenise(row, CharTokenizer())
    assert text_of(example.tokens[example.loss_mask]) == "yes$"


def test_a_template_that_takes_thoughts_out_of_earlier_answers_gives_an_example_each():
    class Thinking(CharTokenizer):
        chat_template = (
            "{% for m in messages %}<{{ m.role[0] }}>"
            "{{ '(hm)' if loop.last and m.role == 'assistant' }}{{ m.content }}$\n{% endfor %}"
            "{{ '<a>' if add_generation_prompt }}"
        )

    turns = [("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")]
    row = Row(messages=tuple({"role": r, "content": c} for r, c in turns), where="x:3")
    (first, second), _ = tokenise_rows([row], Thinking(), 99)
    assert (
        text_of(first.tokens) == "<u>u$\n<a>(hm)one$" and text_of(second.tokens) == "<u>u$\n<a>one$\n<u>v$\n<a>(hm)two$"
    )
    assert [text_of(e.tokens[e.loss_mask]) for e in (first, second)] == ["(hm)one$", "(hm)two$"]
    with pytest.raises(DataError, match=r"x:3: the chat template writes earlier turns anew .* 2 examples"):
        tokenise_rows([row], Thinking(), 99, single=True)


def chat(*turns):
    return tuple({"role": role, "content": content} for role, content in turns)


MOVED = """{% for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}<u>{{ messages[0].content if loop.last }}{{ m.content }}$
    {%- else %}[{{ m.content }}$]{% endif %}
{%- endfor %}"""
"""As Mistral's: the system message stands in the last turn, so that no answer follows the prompt that it had."""


def test_an_answer_that_its_template_marks_follows_the_prompt_that_it_had():
    row = Row(messages=chat(("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")))
    words = CharTokenizer()
    words.chat_template = MOVED
    with pytest.raises(DataError, match=r"key 'messages\[2\]': the chat template does not extend its own prefix here"):
        tokenise_rows([row], words, 99)
    words.chat_template = MOVED.replace("{{ m.content }}$]", "{% generation %}{{ m.content }}${% endgeneration %}]")
    found, _ = tokenise_rows([row], words, 99)
    assert [text_of(e.tokens) for e in found] == ["<u>su$one$", "<u>u$[one$]<u>sv$two$"]
    assert [text_of(e.tokens[e.loss_mask]) for e in found] == ["one$", "two$"]
    turns = [dict(turn, weight=0) if turn["content"] == "one" else turn for turn in row.messages]
    (example,), _ = tokenise_rows([Row(messages=tuple(turns))], words, 99)
    assert text_of(example.tokens) == "<u>u$[one$]<u>sv$two$"
    # a prompt that differs from its first word on
    words.chat_template = "{{ '?' if add_generation_prompt }}" + words.chat_template
    found, _ = tokenise_rows([row], words, 99)
    assert [text_of(e.tokens) for e in found] == ["?<u>su$one$", "?<u>u$[one$]<u>sv$two$"]
    # as DeepSeek R1's: the prompt opens more than the turn's header, which may stand in the mark
    words.chat_template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<a>{{ m.content }}$"
    words.chat_template += "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
    words.chat_template += "{{ '<a>(' if add_generation_prompt }}"
    found, _ = tokenise_rows([row], words, 99)
    assert [text_of(e.tokens) for e in found] == ["s|u|<a>(one$", "s|u|<a>one$v|<a>(two$"]
    assert [text_of(e.tokens[e.loss_mask]) for e in found] == ["one$", "two$"]


def test_of_an_answer_that_extends_its_prompt_what_is_marked_is_learnt():
    words, row = CharTokenizer(), Row(messages=chat(("user", "u"), ("assistant", "one"), ("assistant", "two")))

    def learnt(answer):
        words.chat_template = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}$\n{% else %}"
        words.chat_template += answer + "{% endif %}{% endfor %}{{ '<a>' if add_generation_prompt }}"
        example = tokenise(row, words)
        return text_of(example.tokens[example.loss_mask])

    said = "(hm){{ m.content }}"
    plain = learnt(f"<a>{said}$\n")
    assert plain == "(hm)one$(hm)two$"
    # the turn's header is the prompt's, and the end of the turn is learnt wherever the mark ends
    assert learnt("{% generation %}<a>" + said + "$\n{% endgeneration %}") == plain
    assert learnt("<a>{% generation %}" + said + "{% endgeneration %}$\n") == plain
    assert learnt("<a>(hm){% generation %}{{ m.content }}{% endgeneration %}$\n") == "one$two$"
    last = "{% generation %}{{ m.content }}{% endgeneration %}"
    assert learnt("<a>{% if m.content == 'two' %}" + last + "{% else %}{{ m.content }}{% endif %}$\n") == "two$"
    with pytest.raises(DataError, match="the chat template writes, or marks, no answer"):
        learnt("<a>{{ m.content }}$\n{% if false %}" + last + "{% endif %}")


def test_tools_are_in_the_prompt_and_a_template_without_them_is_told():
    words, row = CharTokenizer(), Row(messages=chat(("user", "u"), ("assistant", "one")), tools=({"name": "add"},))
    with pytest.warns(UserWarning, match="the chat template does not write the rows' 'tools'"):
        assert text_of(tokenise(row, words).tokens) == "<u>u$\n<a>one$"
    words.chat_template = "{% for t in tools or () %}({{ t.name }}){% endfor %}" + CharTokenizer.chat_template
    example = tokenise(row, words)
    assert text_of(example.tokens) == "(add)<u>u$\n<a>one$" and text_of(example.prompt) == "(add)<u>u$\n<a>"


def spaced():
    """As Llama 2's: a space before any text, that a token may begin with."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "\u2581", "\n", "h", "i", "Y", "o", "-", ">", "\u2581Y", "\u2581h", "|"]
    bpe = models.BPE({w: n for n, w in enumerate(words)}, [("\u2581", "Y"), ("\u2581", "h")], unk_token="<unk>")
    found = Tokenizer(bpe)
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    found.decoder = decoders.Replace("\u2581", " ")
    template = (
        "{% for m in messages %}|{{ m.role[0] }}|\n{{ m.content }}</s>\n{% endfor %}"
        "{{ '|a|\n' if add_generation_prompt }}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", eos_token="</s>", chat_template=template)


def test_no_space_comes_into_the_middle_of_a_text():
    words = spaced()
    assert words("Yo")["input_ids"] == [10, 7]  # the space before any text
    example = tokenise(Row("hi ->", " Yo"), words)
    assert example.tokens.tolist() == [*words("hi -> Yo")["input_ids"], 1]
    turns = [("user", "hi"), ("assistant", "Yo"), ("user", "hi"), ("assistant", "Yo")]
    messages = [{"role": r, "content": c} for r, c in turns]
    example = tokenise(Row(messages=tuple(messages)), words)
    text = words.apply_chat_template(messages, tokenize=False)
    assert example.tokens.tolist() == words(text, add_special_tokens=False)["input_ids"][:-2]  # but the last newline
    assert words.decode(example.tokens[example.loss_mask]) == "Yo</s>Yo</s>"


def make(lengths):
    return [Example(np.arange(n, dtype=np.int32) + 100 * i, np.arange(n) >= n - 2) for i, n in enumerate(lengths)]


def test_collate_names_the_position_before_each_label():
    batch = collate(make([3, 5]), 3, 6, 6)
    flat = batch["tokens"].reshape(-1)
    real = batch["weights"] > 0
    assert real.sum() == 4
    np.testing.assert_array_equal(flat[batch["positions"][real] + 1], batch["labels"][real])
    np.testing.assert_array_equal(batch["labels"][real], [1, 2, 103, 104])
    assert batch["mask"].sum() == 8
    with pytest.raises(ValueError, match="do not fit"):
        collate(make([7]), 1, 6, 6)


def test_an_epoch_has_every_example_once_in_few_shapes():
    examples = make(np.random.default_rng(0).integers(3, 60, 101))
    lengths = bucket_lengths(examples, 3)
    assert len(lengths) <= 3 and all(n % 8 == 0 for n in lengths)
    source = BatchSource(examples, 8, lengths, seed=5, steps=1000)
    batches = [source[n] for n in range(source.per_epoch)]
    assert len({b["tokens"].shape for b in batches}) == len(lengths)
    firsts = [t for b in batches for t, m in zip(b["tokens"][:, 0], b["mask"][:, 0], strict=True) if m]
    assert sorted(firsts) == [100 * n for n in range(101)]
    again = BatchSource(examples, 8, lengths, seed=5, steps=1000)
    other = BatchSource(examples, 8, lengths, seed=6, steps=1000)
    same = lambda a, b: all(np.array_equal(a[n]["tokens"], b[n]["tokens"]) for n in (0, 7, 40))
    assert same(source, again) and not same(source, other)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_bucket_lengths_pad_to_the_fewest_tokens(count):
    sizes = np.random.default_rng(count).choice([3, 9, 20, 31, 50, 90], 40, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
    found = bucket_lengths(make(sizes), count)
    every = sorted({-(-int(n) // 8) * 8 for n in sizes})
    tokens = lambda lengths: sum(min(n for n in lengths if n >= size) for size in sizes)
    chosen = [
        lengths for k in range(1, count + 1) for lengths in itertools.combinations(every, k) if lengths[-1] == every[-1]
    ]
    assert len(found) <= count and found == sorted(found)
    assert tokens(found) == min(map(tokens, chosen))


def test_position_is_restored():
    examples = make([5] * 40)
    source = BatchSource(examples, 4, [8], seed=1, steps=30)
    it = source.iterator()
    for _ in range(13):
        next(it)
    state = it.get_state()
    rest = [b["tokens"] for b in it]
    resumed = BatchSource(examples, 4, [8], seed=1, steps=30).iterator()
    resumed.set_state(state)
    again = [b["tokens"] for b in resumed]
    assert len(rest) == 17
    np.testing.assert_array_equal(rest, again)


def test_accumulation_stacks_the_same_examples():
    examples = make([5] * 16)
    one = BatchSource(examples, 8, [8], seed=1, steps=2)[1]
    two = BatchSource(examples, 4, [8], seed=1, steps=2, accumulate=2)[1]
    np.testing.assert_array_equal(one["tokens"], two["tokens"].reshape(8, 8))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_step_an_epoch_is_not_full_whatever_the_buckets(accumulate):
    sizes = np.random.default_rng(0).integers(3, 60, 101)
    # short ones have more labels than long ones
    examples = [Example(np.arange(n, dtype=np.int32), np.arange(n) >= (n > 15) * (n - 2)) for n in sizes]
    source = BatchSource(examples, 4, bucket_lengths(examples), steps=1000, accumulate=accumulate)
    every = [source[n] for n in range(source.per_epoch)]
    rows = 4 * accumulate
    full = sorted(int(batch["mask"].any(axis=-1).sum()) for batch in every)
    assert full == [101 % rows] + [rows] * (101 // rows)
    assert source.shapes == len({batch["tokens"].shape for batch in every}) > 1
    assert sum(int(batch["mask"].sum()) for batch in every) == sizes.sum()
    assert sum(batch["weights"].sum() for batch in every) == sum(e.loss_mask[1:].sum() for e in examples)
