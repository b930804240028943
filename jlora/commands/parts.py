"""The parts of a run: rows to tokens to batches, the objective, the adapter, evaluation and samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax

import jlora
from jlora.commands.settings import TrainConfig
from jlora.commands.written import prompt_of, prompts_of
from jlora.data import BatchSource, Columns, Example, PackedSource, Row, bucket_lengths, read_rows
from jlora.generate import GenerateConfig, generate_text
from jlora.inits import CHANGES_BASE
from jlora.io import Pretrained
from jlora.io.adapters import About, about, load_adapter, method_in, save_adapter
from jlora.lora import on_plain_base
from jlora.methods import adalora, named
from jlora.methods.lora_plus import lora_plus
from jlora.methods.prefix import settle
from jlora.train import OptimiserConfig, answer_sums, make_optimiser
from jlora.train.optimiser import clipped, unclipped

C = TypeVar("C", bound=TrainConfig)


def rates(config: TrainConfig) -> OptimiserConfig:
    """The optimiser's settings among a run's."""
    names = {field.name for field in dataclasses.fields(OptimiserConfig)}
    return OptimiserConfig(**{name: value for name, value in dataclasses.asdict(config).items() if name in names})


def optimiser_of(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The run's optimiser; for lora-plus B's rate is `ratio` times A's, of an adapter to go on from too; for adalora it
    keeps the budget of ranks."""
    settings, names = rates(config), named.names_of(config.method)
    if "adalora" in names and not config.adapter:
        return adalora.budgeted(make_optimiser(settings, steps), named.budget(method_of(config), steps))
    if "lora-plus" not in names:
        return make_optimiser(settings, steps)
    one = lambda rate: unclipped(dataclasses.replace(settings, learning_rate=rate), steps)
    return clipped(lora_plus(one, settings.learning_rate, config.ratio), settings.clip)


def method_of(config: TrainConfig) -> named.MethodConfig:
    """The method's settings among a run's."""
    names = {field.name for field in dataclasses.fields(named.MethodConfig)}
    return named.MethodConfig(**{name: value for name, value in dataclasses.asdict(config).items() if name in names})


def going_on(config: C) -> C:
    """The settings, the method's being those of the adapter to go on from, if there is one. Raises ValueError where
    others are given; lora-plus, which is the optimiser's, may be.
    """
    if not config.adapter:
        return config
    own, default = method_in(config.adapter), named.MethodConfig()
    own = dataclasses.replace(own, method=own.method.replace("lora-plus", "lora"))
    if "lora-plus" in named.names_of(config.method):
        rest = [name for name in named.names_of(own.method) if name != "lora"]
        own = dataclasses.replace(own, method="+".join(["lora-plus", *rest]))
        default = dataclasses.replace(default, method="lora-plus")
    kinds = {"method": lambda names: set(named.names_of(names)), "targets": set, "exclude": set}
    wrong = []
    for name, value in vars(own).items():
        given, form = getattr(config, name), kinds.get(name, lambda value: value)
        if form(given) not in (form(getattr(default, name)), form(value)):
            wrong.append(f"{name} = {given}, and that of {config.adapter} is {value}")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: leave it out")
    return dataclasses.replace(config, **vars(own))


def made_by(
    config: TrainConfig,
    base: Pretrained,
    whole: tuple[str, ...] = (),
    sight: Callable[[], named.Sight] = lambda: None,  # pyright: ignore[reportArgumentType]
) -> tuple[About, Callable[[Any], tuple[Any, Any]]]:
    """(what the adapter is, params -> (frozen, trained)): a fresh one, or the one to go on from. whole: modules that
    train whole beside a fresh one. sight: what eva looks at, if it may."""
    if config.adapter:
        folder = config.adapter
        return about(folder), lambda params: load_adapter(dataclasses.replace(base, params=params), folder)[:2]
    settings, key = method_of(config), jax.random.key(config.seed)
    more = {"train": whole, "sight": sight() if "eva" in named.names_of(settings.method) else None}
    return settings, lambda params: named.make(params, settings, layouts=base.layouts, key=key, **more)


def keeper(config: TrainConfig, base: Pretrained, what: About, start: Any) -> Callable[..., Path]:
    """save(folder, trained, card=...): writes the adapter for the base as it is read from its source.

    start: the trained tree before the first step. P-tuning's network is replaced by what it gives, AdaLoRA's triples by
    plain factors of the ranks that are left.
    """
    changed = isinstance(what, named.MethodConfig) and named.lora_config(what).init_lora_weights in CHANGES_BASE
    if isinstance(what, named.MethodConfig) and changed:
        grown = 2**0.5 if named.lora_config(what).use_rslora else 2
        what = dataclasses.replace(what, rank=2 * what.rank, alpha=grown * what.alpha)

    def save(folder: Path, trained: Any, card: dict[str, Any] | None = None) -> Path:
        plain = on_plain_base(trained, start) if changed and not config.adapter else trained
        return save_adapter(folder, base, adalora.settle(settle(plain)), what, card=card)

    return save


def rows_of(config: TrainConfig, source: str, judged: bool = False) -> list[Row]:
    """The rows of `source` by the settings' columns and templates. judged: those to evaluate on, all of them."""
    split, limit = (config.eval_split, 0) if judged else (config.split, config.limit)
    columns = Columns(config.columns, config.prompt, config.completion, header=config.header)
    return read_rows(source, split=split, columns=columns, limit=limit)


def batches_of(config: TrainConfig, examples: list[Example], steps: int, own: Any = None) -> BatchSource:
    """The order of batches: by buckets of length, or packed. own: the rows this process fills; None: all."""
    how: dict[str, Any] = {"seed": config.seed, "steps": steps, "accumulate": config.accumulate, "own": own}
    if config.packing:
        return PackedSource(examples, config.batch, config.max_length, **how)
    return BatchSource(examples, config.batch, bucket_lengths(examples, config.buckets), **how)


def objective(config: TrainConfig, base: Pretrained) -> Any:
    """(trained, frozen, batch, key or None) -> `Sums`: with a key the training loss, without it the plain one."""
    plain = jlora.lift(answer_sums(base.model))
    options: dict[str, Any] = {"smoothing": config.label_smoothing, "z_loss": config.z_loss, "neftune": config.neftune}
    return trained_or_judged(plain, jlora.lift(answer_sums(base.model, **options)), config.dropout)


def trained_or_judged(plain: Any, shaped: Any, dropout: float) -> Any:
    """(trained, frozen, batch, key or None) -> sums: `shaped(params, batch, key)` under `dropout` where there is a key,
    `plain(params, batch)` without; both lifted.
    """

    def sums(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        if key is None:
            return plain(jlora.combine(frozen, trained), batch)
        drop, noise = jax.random.split(key)
        return shaped(jlora.combine(frozen, trained, dropout=dropout, key=drop if dropout else None), batch, noise)

    return sums


def answer(base: Pretrained, params: Any, row: Row) -> str:
    """What the model writes after a row's prompt, greedily, as long as the wanted answer and a little more."""
    room = len(base.tokenizer(row.completion)["input_ids"]) + 6
    how = GenerateConfig(max_new_tokens=min(room, 128), end=base.ends)
    asked = prompts_of(base, [prompt_of(row, base.tokenizer)], how.max_new_tokens)
    (text,) = generate_text(base.model, params, base.tokenizer, asked, how)
    return text
