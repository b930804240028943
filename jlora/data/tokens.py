"""Rows to tokens with a loss mask: the answer and its end-of-turn token carry the loss, the prompt does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jlora.data.files import DataError
from jlora.data.rows import Row
from jlora.data.template import render as render_template


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
    """One row by a Hugging Face tokenizer. ends: the tokens that end a turn, the tokenizer's where there are none
    (`Pretrained.ends`). Raises DataError where the template does not extend its own prefix."""
    if row.kind == "label":
        both = [row.text] if row.pair is None else [row.text, row.pair]
        tokens = [int(token) for token in tokenizer(*both)["input_ids"]]
        pieces = [(tokens, False)]
    elif row.messages:
        pieces = chat_pieces(row, tokenizer, ends)
    else:
        answer = text_ids(tokenizer, row.completion) + _end(tokenizer)
        pieces = [(prompt_ids(tokenizer, row.prompt), False), (answer, True)]
    tokens = [token for ids, _ in pieces for token in ids]
    mask = [answer for ids, answer in pieces for _ in ids]
    return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool))


def chat_pieces(row: Row, tokenizer: Any, ends: Sequence[int] = ()) -> list[tuple[list[int], bool]]:
    """(tokens, is answer) pieces of a chat: each assistant turn is what `messages[:i+1]` rendered adds to
    `messages[:i]` rendered with the generation prompt, so no `{% generation %}` tag is needed in the template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{row.where}: key 'messages' needs a tokenizer with a chat template; this one has none")

    def render(count: int, prompt: bool) -> str:
        return render_template(tokenizer, row.messages[:count], prompt, row.where)

    pieces: list[tuple[list[int], bool]] = []
    done = ""
    for n, message in enumerate(row.messages):
        if message["role"] != "assistant" or n < row.given:
            continue
        before, after = render(n, True), render(n + 1, False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(f"{row.where}: key 'messages[{n}]': the chat template does not extend its own prefix here")
        pieces.append((text_ids(tokenizer, before[len(done) :]), False))
        answer = text_ids(tokenizer, after[len(before) :])
        # what a template writes after the end of a turn (a newline) is no part of the answer
        over = (n + 1 for n, token in enumerate(answer) if token in (ends or _end(tokenizer)))
        stop = next(over, len(answer))
        pieces += [(answer[:stop], True), (answer[stop:], False)]
        done = after
    return pieces[:-1]


def tokenise_rows(
    rows: Iterable[Row], tokenizer: Any, max_length: int, ends: Sequence[int] = ()
) -> tuple[list[Example], int]:
    """(examples of at most `max_length` tokens, how many were cut), as `tokenise`. A cut drops the left of a prompt,
    never an answer's end; a row whose answer alone is longer keeps the answer's last tokens."""
    out, cut = [], 0
    for row in rows:
        example = tokenise(row, tokenizer, ends)
        if len(example.tokens) > max_length:
            cut += 1
            example = Example(example.tokens[-max_length:], example.loss_mask[-max_length:])
        out.append(example)
    return out, cut


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


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
