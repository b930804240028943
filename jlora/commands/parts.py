"""The parts of a run: rows to tokens to batches, the objective, the adapter, evaluation and samples."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import jlora
from jlora.commands.settings import TrainConfig, say
from jlora.data import BatchSource, Columns, Example, PackedSource, Row, bucket_lengths, read_rows, tokenise_rows
from jlora.generate import GenerateConfig, generate_text
from jlora.inits import CHANGES_BASE
from jlora.io import Pretrained
from jlora.io.adapters import About, about, load_adapter, save_adapter
from jlora.lora import on_plain_base
from jlora.methods import named
from jlora.methods.lora_plus import lora_plus
from jlora.methods.prefix import settle
from jlora.train import OptimiserConfig, answer_sums, evaluate, make_eval_step, make_optimiser
from jlora.train.loop import Stop
from jlora.train.report import Reporter


def rates(config: TrainConfig) -> OptimiserConfig:
    """The optimiser's settings among a run's."""
    names = {field.name for field in dataclasses.fields(OptimiserConfig)}
    return OptimiserConfig(**{name: value for name, value in dataclasses.asdict(config).items() if name in names})


def optimiser_of(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The run's optimiser; for lora-plus B's rate is `ratio` times A's."""
    settings = rates(config)
    if config.adapter or "lora-plus" not in named.names_of(config.method):
        return make_optimiser(settings, steps)
    one = lambda rate: make_optimiser(dataclasses.replace(settings, learning_rate=rate, clip=0.0), steps)
    both = lora_plus(one, settings.learning_rate, config.ratio)
    return optax.chain(optax.clip_by_global_norm(settings.clip), both) if settings.clip else both


def method_of(config: TrainConfig) -> named.MethodConfig:
    """The method's settings among a run's."""
    names = {field.name for field in dataclasses.fields(named.MethodConfig)}
    return named.MethodConfig(**{name: value for name, value in dataclasses.asdict(config).items() if name in names})


def made_by(config: TrainConfig, base: Pretrained) -> tuple[About, Callable[[Any], tuple[Any, Any]]]:
    """(what the adapter is, params -> (frozen, trained)): a fresh one, or the one to go on from."""
    if config.adapter:
        folder = config.adapter
        return about(folder), lambda params: load_adapter(dataclasses.replace(base, params=params), folder)[:2]
    settings, key = method_of(config), jax.random.key(config.seed)
    named.names_of(settings.method)
    return settings, lambda params: named.make(params, settings, layouts=base.layouts, key=key)


def keeper(config: TrainConfig, base: Pretrained, what: About, start: Any) -> Callable[..., Path]:
    """save(folder, trained, card=...): writes the adapter for the base as it is read from its source.

    start: the trained tree before the first step. P-tuning's network is replaced by what it gives.
    """
    settings = named.lora_config(what) if isinstance(what, named.MethodConfig) else what
    changed = not config.adapter and settings.init_lora_weights in CHANGES_BASE
    if changed:
        grown = 2**0.5 if settings.use_rslora else 2
        settings = dataclasses.replace(settings, r=2 * settings.r, lora_alpha=grown * settings.lora_alpha)

    def save(folder: Path, trained: Any, card: dict[str, Any] | None = None) -> Path:
        plain = on_plain_base(trained, start) if changed else trained
        return save_adapter(folder, base, settle(plain), settings if changed else what, card=card)

    return save


def rows_of(config: TrainConfig, source: str) -> list[Row]:
    """The rows of `source` by the settings' columns and templates."""
    columns = Columns(config.columns, config.prompt, config.completion)
    return read_rows(source, split=config.split, columns=columns, limit=config.limit)


def digest(examples: list[Example]) -> int:
    """A checksum of the tokens and of what carries the loss, to tell one data set from another."""
    value = 0
    for example in examples:
        value = zlib.crc32(example.loss_mask.tobytes(), zlib.crc32(example.tokens.tobytes(), value))
    return value


def tokens_of(rows: list[Row], base: Pretrained, config: TrainConfig, name: str) -> list[Example]:
    """The rows as tokens; says how many were cut. Raises ValueError without a tokenizer."""
    if base.tokenizer is None:
        raise ValueError(f"{base.source} has no tokenizer: rows of text need tokenizer.json beside the weights")
    examples, cut = tokenise_rows(rows, base.tokenizer, config.max_length)
    if cut:
        say(f"{name}: {cut} of {len(rows)} examples were cut on the left to max_length = {config.max_length}")
    return examples


def batches_of(config: TrainConfig, examples: list[Example], steps: int) -> BatchSource:
    """The order of batches: by buckets of length, or packed."""
    if config.packing:
        how = {"seed": config.seed, "steps": steps, "accumulate": config.accumulate}
        return PackedSource(examples, config.batch, config.max_length, **how)
    lengths = bucket_lengths(examples, config.buckets)
    return BatchSource(examples, config.batch, lengths, seed=config.seed, steps=steps, accumulate=config.accumulate)


def objective(config: TrainConfig, base: Pretrained) -> Any:
    """(trained, frozen, batch, key or None) -> `Sums`: with a key the training loss, without it the plain one."""
    plain = jlora.lift(answer_sums(base.model))
    options = {"smoothing": config.label_smoothing, "z_loss": config.z_loss, "neftune": config.neftune}
    shaped = jlora.lift(answer_sums(base.model, **options))

    def sums(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        if key is None:
            return plain(jlora.combine(frozen, trained), batch)
        drop, noise = jax.random.split(key)
        params = jlora.combine(frozen, trained, dropout=config.dropout, key=drop if config.dropout else None)
        return shaped(params, batch, noise)

    return sums


def steps_of(config: TrainConfig, examples: list[Example]) -> int:
    """`steps`, or what `epochs` passes over the examples take."""
    return config.steps or max(1, round(config.epochs * batches_of(config, examples, 1).per_epoch))


def judged(
    name: str, judge: Any, trained: Any, frozen: Any, testing: BatchSource, stop: Stop = lambda: False
) -> dict[str, float]:
    """Evaluate on the held-out rows, with progress; raises `Interrupted` once `stop()`."""
    with Reporter(len(testing), label=f"evaluating {name}", every=10) as bar:

        def watched() -> Any:
            for n in range(len(testing)):
                yield testing[n]
                bar.update(n + 1)

        result = evaluate(judge, trained, frozen, watched(), stop)
    right, exact = result["first"], result["exact"]
    say(f"{name}: first token right {right:.1%}, exact answer {exact:.1%}, loss {result['loss']:.3f}")
    return result


def first_judged(
    config: TrainConfig,
    base: Pretrained,
    tuned: Pretrained,
    judge: Any,
    trained: Any,
    frozen: Any,
    testing: BatchSource,
) -> dict[str, float]:
    """`judged` before the first step: of the base, or of the adapter to go on from."""
    if tuned.model is base.model or config.adapter:
        return judged("before", judge, trained, frozen, testing)
    # an untrained prefix is not the model that it is put before
    nothing = jax.tree.map(lambda _: None, base.params)
    return judged("before", make_eval_step(objective(config, base)), nothing, base.params, testing)


def answer(base: Pretrained, params: Any, row: Row) -> str:
    """What the model writes after a row's prompt, greedily, as long as the wanted answer and a little more."""
    room = len(base.tokenizer(row.completion)["input_ids"]) + 6
    (text,) = generate_text(
        base.model, params, base.tokenizer, [row.prompt], GenerateConfig(max_new_tokens=min(room, 128))
    )
    return text


def samples(base: Pretrained, tuned: Any, rows: list[Row], before: list[str]) -> list[dict[str, str]]:
    """{prompt, want, before, after} of each row; said on the way."""
    found = []
    for row, was in zip(rows, before, strict=True):
        now = answer(base, tuned, row)
        found.append({"prompt": row.prompt, "want": row.completion, "before": was, "after": now})
        say(f"{row.prompt!r}\n  before {was!r}\n  after  {now!r} (want {row.completion!r})")
    return found
