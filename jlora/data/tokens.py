"""Rows to tokens with a loss mask: the answer and its end-of-turn token carry the loss, the prompt does not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np

from jlora.data.chats import Message
from jlora.data.files import DataError
from jlora.data.marks import Span, marks_of
from jlora.data.rows import Row
from jlora.data.template import render as render_template

GIVE = "give one of your own (chat_template)"
Piece = tuple[list[int], bool]
"""Tokens, and whether they are learnt."""


@dataclasses.dataclass(frozen=True)
class Example:
    """`tokens` i32 [n]; `loss_mask` bool [n], True where the token is an answer's and is to be predicted."""

    tokens: np.ndarray
    loss_mask: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the first answer token, i32 [m]."""
        return self.tokens[: int(np.argmax(self.loss_mask))]


def tokenise(row: Row, tokenizer: Any, ends: Sequence[int] = ()) -> Example:
    """One row by a Hugging Face tokenizer, if it is one example. ends: the tokens that end a turn, the tokenizer's
    where there are none (`Pretrained.ends`). Raises DataError where it is several (`examples_of`)."""
    found = examples_of(row, tokenizer, ends)
    if len(found) > 1:
        raise DataError(
            f"{row.where}: the chat template writes earlier turns anew as a chat goes on, so its answers make "
            f"{len(found)} examples, and one is wanted here: leave one answer in each row"
        )
    return found[0]


def examples_of(row: Row, tokenizer: Any, ends: Sequence[int] = ()) -> list[Example]:
    """A row as `tokenise`: one example, or of a chat one for each stretch of turns that the template leaves as they
    were (Qwen 3's takes the thoughts out of earlier answers). Raises DataError where an answer's prompt does not begin
    it."""
    if row.kind == "label":
        both = [row.text] if row.pair is None else [row.text, row.pair]
        many = [[([int(token) for token in tokenizer(*both)["input_ids"]], False)]]
    elif row.messages:
        many = chat_pieces(row, tokenizer, ends)
    else:
        answer, end = continued(tokenizer, row.prompt, row.completion), _end(tokenizer)
        closed = bool({*ends, *end} & {*answer[-1:]})
        many = [[(prompt_ids(tokenizer, row.prompt), False), (answer if closed else answer + end, True)]]
    return [joined(pieces) for pieces in many]


def joined(pieces: Sequence[Piece]) -> Example:
    tokens = [token for ids, _ in pieces for token in ids]
    mask = [learnt for ids, learnt in pieces for _ in ids]
    return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool))


def chat_pieces(row: Row, tokenizer: Any, ends: Sequence[int] = ()) -> list[list[Piece]]:
    """The pieces of a chat's examples. A turn of weight 0 (as in OpenAI's files) is not learnt."""
    many: list[list[Piece]] = []
    done = ""
    for message, before, text, words in answers(row, tokenizer):
        if not many or not before.startswith(done):
            many, done = [*many, []], ""
        pieces, at, learnt = many[-1], len(done), message.get("weight") != 0
        for begin, end in words:
            pieces.append((continued(tokenizer, text[:at], text[at:begin]), False))
            pieces.append((continued(tokenizer, text[:begin], text[begin:end]), learnt))
            at = end
        rest = continued(tokenizer, text[:at], text[at:])
        answer, rest = ended(pieces.pop()[0], rest, ends or _end(tokenizer))
        pieces += [(answer, learnt), (rest, False)]
        done = text
    found = [pieces[:-1] for pieces in many if any(learnt and ids for ids, learnt in pieces)]
    if not found:
        raise DataError(f"{row.where}: the chat template writes, or marks, no answer: there is nothing to learn")
    return found


def answers(row: Row, tokenizer: Any) -> Iterator[tuple[Message, str, str, Sequence[Span]]]:
    """(the turn, its prompt, the prompt with the answer, where in that the model's own words stand) of each assistant
    turn: after `messages[:i]` rendered with the generation prompt, which is what the model will read, comes what
    `messages[:i+1]` rendered adds, or of that what the template marks by `{% generation %}`."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{row.where}: key 'messages' needs a chat template, and the tokenizer has none: {GIVE}")

    def render(count: int, prompt: bool, tools: Sequence[Any] = row.tools) -> str:
        return render_template(tokenizer, row.messages[:count], prompt, row.where, tools)

    every = len(row.messages)
    if row.tools and render(every, False) == render(every, False, ()):
        warnings.warn("the chat template does not write the rows' 'tools': they are used without them", stacklevel=2)
    for n, message in enumerate(row.messages):
        if message["role"] != "assistant" or n < row.given:
            continue
        before = render(n, True)
        found = answer_in(before, render(n + 1, False))
        if found is None:
            raise DataError(
                f"{row.where}: key 'messages[{n}]': the chat template does not extend its own prefix here: {GIVE} that "
                "does, or that marks the answer by {% generation %}"
            )
        text, words = found
        if words:
            yield message, before, text, words


def posed(row: Row, tokenizer: Any, ends: Sequence[int]) -> Row:
    """A chat with its last learnt answer as `completion`, without special tokens, and as `prompt` the text that the
    model reads before it; another row as it is. Raises what `answers` does."""
    if not row.messages:
        return row
    before, text = [(before, text) for turn, before, text, _ in answers(row, tokenizer) if turn.get("weight") != 0][-1]
    said, _ = ended(continued(tokenizer, before, text[len(before) :]), [], ends)
    return dataclasses.replace(row, prompt=before, completion=tokenizer.decode(said, skip_special_tokens=True))


def answer_in(before: str, after: str) -> tuple[str, Sequence[Span]] | None:
    """(the text with an answer, where in it the model's own words stand). before: the prompt, with which it begins;
    after: the template's text with the answer. None where that neither begins with the prompt nor is marked."""
    start, marks = len(commonprefix((before, after))), marks_of(after)  # noqa: RUF071 - of characters
    words = [(start, len(after))]
    if marks is not None:  # which may hold the turn's header too (SmolLM3's do), and that is the prompt's
        own = marks[len(marks_of(before) or ()) :]
        words = [(max(begin, start), end) for begin, end in own if end > start]
    if start == len(before) or not words:
        return after, words
    if marks is None:
        return None
    first = words[0][0]
    moved = len(before) - first
    return before + after[first:], [(begin + moved, end + moved) for begin, end in words]


def ended(answer: list[int], rest: list[int], ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """The answer up to its end token, which may be the first after it, and the rest: what a template writes after the
    end of a turn (a newline) is no part of the answer."""
    tokens = answer + rest
    stop = next((n + 1 for n, token in enumerate(tokens[: len(answer) + 1]) if token in ends), len(answer))
    return tokens[:stop], tokens[stop:]


def tokenise_rows(
    rows: Iterable[Row], tokenizer: Any, max_length: int, ends: Sequence[int] = (), single: bool = False
) -> tuple[list[Example], int]:
    """(examples of at most `max_length` tokens, how many were cut), as `examples_of`, or as `tokenise` if `single`.

    A text is not cut but taken in `pieces`, if not `single`. A cut drops the left of a prompt, but not its begin token,
    and never an answer's end; a row whose answer alone is longer keeps the answer's last tokens."""
    read = (lambda *row: [tokenise(*row)]) if single else examples_of
    bos, cut = getattr(tokenizer, "bos_token_id", None), 0
    found: list[Example] = []
    for row in rows:
        for example in read(row, tokenizer, ends):
            if row.kind == "text" and not single and 1 < max_length < len(example.tokens):
                found += pieces(example, max_length, bos)
            else:
                found.append(shortened(example, max_length, bos))
                cut += len(example.tokens) > max_length
    return found, cut


def pieces(example: Example, most: int, bos: int | None) -> list[Example]:
    """A text as examples of at most so many tokens, in which every token but its first is learnt once: each begins with
    the begin token, if the text does, else with the last token of the one before."""
    tokens, found = example.tokens, []
    for at in range(1, len(tokens), most - 1):
        some = np.r_[0 if tokens[0] == bos else at - 1, at : min(at + most - 1, len(tokens))]
        found.append(Example(tokens[some], np.r_[False, example.loss_mask[some[1:]]]))
    return found


def kept(tokens: Any, most: int, bos: int | None) -> np.ndarray:
    """Which of the tokens [n] stay if at most so many may: the begin token, if they have one, and the last."""
    if len(tokens) <= most:
        return np.arange(len(tokens))
    begin = int(most > 1 and tokens[0] == bos)
    return np.r_[:begin, len(tokens) - most + begin : len(tokens)]


def shortened(example: Example, most: int, bos: int | None) -> Example:
    """What is `kept` of it. An answer whose beginning is cut off is not learnt, unless it is the only one."""
    if len(example.tokens) <= most:
        return example
    at = kept(example.tokens, most, bos)
    tokens, mask = example.tokens[at], example.loss_mask[at]
    begin = int(at[0] == 0)  # the first token after the cut
    if mask[begin] and example.loss_mask[at[begin] - 1]:
        rest = np.where(np.cumsum(~mask[begin:]), mask[begin:], False)  # from the first token on that is not learnt
        mask = np.r_[mask[:begin], rest] if rest.any() else mask
    return Example(tokens, mask)


def continued(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of `text` after the text `before`: tokenizers that put a space before any text (Llama 2's) would put
    one in the middle. Where the two texts share a token, those of `text` alone."""
    head = before[-64:]
    if head:
        first, both = text_ids(tokenizer, head), text_ids(tokenizer, head + text)
        if both[: len(first)] == first:
            return both[len(first) :]
    return text_ids(tokenizer, text)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt, for training, writing and serving alike: the begin token before them where the tokenizer
    puts one there itself, or where they would be none. A text that begins with it gets no second one."""
    ids, bos = text_ids(tokenizer, text), getattr(tokenizer, "bos_token_id", None)
    if bos is None or ids[:1] == [bos]:
        return ids
    # of a letter, as "" may be an end token alone; `add_bos_token` says nothing of Llama 3's, which adds one
    adds = not ids or list(tokenizer("a")["input_ids"])[:1] == [bos]
    return [int(bos), *ids] if adds else ids


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as it stands."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def turn_end(tokenizer: Any) -> tuple[int, ...]:
    """The special token that the chat template puts after an answer, if it does: Qwen's base models end a text in
    another."""
    said = "an answer"
    try:
        text = render_template(
            tokenizer, [{"role": "user", "content": "-"}, {"role": "assistant", "content": said}], False
        )
    except ValueError:  # no template, or one that has more to ask of a chat
        return ()
    special, after = special_ids(tokenizer), text_ids(tokenizer, text.rpartition(said)[2])
    return next(((n,) for n in after if n in special), ())


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that are no text."""
    return {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
