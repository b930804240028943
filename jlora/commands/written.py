"""Answers that a model writes, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jlora.commands.settings import say
from jlora.data import Row
from jlora.data.tokens import kept, prompt_ids, text_ids
from jlora.generate import GenerateConfig, generate_text, most_tokens
from jlora.io import Pretrained
from jlora.train.loop import Interrupted, Stop
from jlora.train.metrics import text_metric

Prompt = str | tuple[int, ...]
"""A text that is read as in training, or tokens."""


def prompt_of(row: Row, tokenizer: Any) -> Prompt:
    """A row's prompt; that of a chat (`posed`), whose template writes all there is to read, by its tokens."""
    return tuple(text_ids(tokenizer, row.prompt)) if row.messages else row.prompt


def questions(rows: Sequence[Row], tokenizer: Any = None) -> dict[Prompt, list[str]]:
    """The wanted answers of each prompt: rows of one prompt are one question with several references.

    tokenizer: for chats, which are `posed`. Raises ValueError for a row that is not a prompt and an answer.
    """
    references: dict[Prompt, list[str]] = {}
    for row in rows:
        if row.kind not in ("answer", "chat"):
            raise ValueError(
                f"{row.where}: metrics of written answers need rows of prompt and completion, or of messages"
            )
        references.setdefault(prompt_of(row, tokenizer), []).append(row.completion.strip())
    return references


def write(
    base: Pretrained,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch: int,
    stop: Stop = lambda: False,
) -> list[str]:
    """What the model answers to each prompt, greedily. Raises `Interrupted` between batches once `stop()`."""
    how, texts = GenerateConfig(max_new_tokens=max_new_tokens, end=base.ends), []
    for n in range(0, len(prompts), batch):
        if stop():
            raise Interrupted
        some = list(prompts[n : n + batch])
        asked = prompts_of(base, some, max_new_tokens)
        texts += [t.strip() for t in generate_text(base.model, params, base.tokenizer, asked, how)]
    say(f"{len(texts)} answers written; the first: {texts[0]!r}")
    return texts


def prompts_of(base: Pretrained, prompts: Sequence[Prompt], new: int) -> list[list[int]]:
    """The prompts' tokens; where the model has fewer positions than they and `new` take, the last of them, as in
    training."""
    most = most_tokens(base.model)
    rows = [prompt_ids(base.tokenizer, asked) if isinstance(asked, str) else [*asked] for asked in prompts]
    bos = getattr(base.tokenizer, "bos_token_id", None)
    return rows if most is None else [[row[n] for n in kept(row, max(most - new, 1), bos)] for row in rows]


def short(name: str) -> str:
    """A metric's name in a report: the function's own where it is the user's."""
    return name.rpartition(":")[2]


def scores(names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Each metric of the answers."""
    return {short(name): float(text_metric(name)(texts, references)) for name in names}
