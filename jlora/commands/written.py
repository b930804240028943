"""Answers that a model writes, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jlora.commands.settings import say
from jlora.data import Row
from jlora.data.tokens import kept, prompt_ids
from jlora.generate import GenerateConfig, generate_text, most_tokens
from jlora.io import Pretrained
from jlora.train.loop import Interrupted, Stop
from jlora.train.metrics import text_metric


def questions(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The wanted answers of each prompt: rows of one prompt are one question with several references.

    Raises ValueError for a row that is not a prompt and an answer.
    """
    references: dict[str, list[str]] = {}
    for row in rows:
        if row.kind != "answer":
            raise ValueError(f"{row.where}: metrics of written answers need rows of prompt and completion")
        references.setdefault(row.prompt, []).append(row.completion.strip())
    return references


def write(
    base: Pretrained,
    params: Any,
    prompts: Sequence[str],
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


def prompts_of(base: Pretrained, texts: Sequence[str], new: int) -> list[list[int]]:
    """The prompts' tokens; where the model has fewer positions than they and `new` take, the last of them, as in
    training."""
    most, rows = most_tokens(base.model), [prompt_ids(base.tokenizer, text) for text in texts]
    bos = getattr(base.tokenizer, "bos_token_id", None)
    return rows if most is None else [[row[n] for n in kept(row, max(most - new, 1), bos)] for row in rows]


def short(name: str) -> str:
    """A metric's name in a report: the function's own where it is the user's."""
    return name.rpartition(":")[2]


def scores(names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Each metric of the answers."""
    return {short(name): float(text_metric(name)(texts, references)) for name in names}
