"""Snippets of four domains rated by people (Hutto & Gilbert, ICWSM 2014), as a two-word classification task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from jlora.data.files import DataError
from jlora.data.rows import Row

DOMAINS = {
    "movie-reviews": ("movieReviewSnippets", "Review"),
    "tweets": ("tweets", "Tweet"),
    "amazon-reviews": ("amazonReviewSnippets", "Product review"),
    "nyt-editorials": ("nytEditorialSnippets", "Editorial"),
}
"""By the name that follows `pip:`: the file's, and what a prompt calls its text."""
TEMPLATE = "{kind}: {text}\nSentiment:"


def parse_snippets(path: str | Path) -> list[tuple[float, str]]:
    """(mean rating in [-4, 4], text) of each line `id<TAB>rating<TAB>text`. Raises DataError naming the line."""
    out = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    for line, raw in enumerate(text.splitlines(), start=1):
        parts = raw.split("\t", 2)
        try:
            out.append((float(parts[1]), parts[2].strip()))
        except (IndexError, ValueError):
            raise DataError(f"{path}:{line}: expected id<TAB>rating<TAB>text, got {raw[:60]!r}") from None
    return out


def rated_rows(path: str | Path, kind: str = "Review", threshold: float = 1.0) -> list[Row]:
    """The snippets with |rating| >= `threshold`, answered by " positive" or " negative"."""
    answer = lambda rating: " positive" if rating > 0 else " negative"
    return [
        Row(prompt=TEMPLATE.format(kind=kind, text=text), completion=answer(rating), where=f"{path}")
        for rating, text in parse_snippets(path)
        if abs(rating) >= threshold
    ]


def split_rows(rows: Sequence[Row], held_out: int = 500, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, held out) after a shuffle that depends on `seed` alone. Raises ValueError with too few rows."""
    if not 0 < held_out < len(rows):
        raise ValueError(f"{held_out} rows cannot be held out of {len(rows)}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[n] for n in order[held_out:]], [rows[n] for n in order[:held_out]]
