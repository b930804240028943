"""`jlora train`: model, rows and settings in; adapter, metrics and report out. `jlora demo` is this with a preset."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.commands.dry import describe
from jlora.commands.report import picture, write_json
from jlora.commands.settings import TrainConfig, check, run_identity, save_settings, say
from jlora.data import BatchSource, Example, Row, bucket_lengths, read_rows, split_rows, tokenise_rows
from jlora.generate import GenerateConfig, generate_text
from jlora.io import Pretrained, load
from jlora.io.adapters import load_peft, read_config
from jlora.io.peft import save_peft
from jlora.train import (
    Checkpoints,
    OptimiserConfig,
    answer_sums,
    evaluate,
    fit,
    init_state,
    make_eval_step,
    make_optimiser,
    make_train_step,
)
from jlora.train.report import Metrics, Reporter


def train(config: TrainConfig) -> dict[str, Any]:
    """Run it. Returns {before, after (loss, exact, first ...), samples, adapter, plot}; figures on stderr as they come.

    Raises ValueError for bad settings, rows, or a resumption under other settings, and what `load` raises.
    """
    check(config)
    rows = read_rows(config.data)
    if config.eval_data:
        train_rows, test_rows = rows, read_rows(config.eval_data)
    elif config.held_out >= len(rows):
        raise ValueError(f"held_out = {config.held_out} leaves nothing of the {len(rows)} rows of {config.data}")
    else:
        train_rows, test_rows = split_rows(rows, config.held_out, config.seed) if config.held_out else (rows, [])
    say(f"reading {config.model}")
    base = load(config.model, dtype=jnp.dtype(config.dtype), remat=config.remat, weights=not config.dry_run)
    examples = tokens_of(train_rows, base, config, config.data)
    tests = tokens_of(test_rows, base, config, config.eval_data or "held out") if test_rows else []
    lora_config, make = made_by(config, base)
    if config.dry_run:
        return describe(config, base, make, examples, tests)
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    save_settings(dataclasses.replace(config, resume=False), out / "settings.yaml")
    frozen, lora = make(base.params)
    say(jlora.summary(frozen, lora))
    report = run(config, base, frozen, lora, examples, tests, test_rows)
    card = {"data": config.data, "steps": report["step"]}
    if "after" in report:
        card |= {f"held-out {name}": f"{report['after'][name]:.4g}" for name in ("loss", "exact")}
    trained = report.pop("trained")
    adapter = save_peft(out / "adapter", trained, lora_config, base.tensors, base.source, card=card)
    report["adapter"] = str(adapter)
    metrics = Metrics(out / "metrics.jsonl", resume_at=report["step"]).read()
    try:
        report["plot"] = str(picture(metrics, report, out / "plot.png"))
    except ImportError as error:
        say(f"no plot: {error}")
    write_json(out / "report.json", report)
    return report


def run(
    config: TrainConfig,
    base: Pretrained,
    frozen: Any,
    lora: Any,
    examples: list[Example],
    tests: list[Example],
    test_rows: list[Row],
) -> dict[str, Any]:
    """Evaluate, train, evaluate. Returns {before, after, samples, step, trained (the tree)}."""
    out = Path(config.output)
    lifted = jlora.lift(answer_sums(base.model))

    def sums(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        dropout = config.dropout if key is not None else 0.0
        return lifted(jlora.combine(frozen, trained, dropout=dropout, key=key if dropout else None), batch)

    steps = steps_of(config, examples)
    rates = {name: getattr(config, name) for name in ("learning_rate", "schedule", "warmup", "weight_decay", "clip")}
    tx = make_optimiser(OptimiserConfig(**rates), steps)
    step = make_train_step(sums, tx, seed=config.seed, accumulate=config.accumulate)
    judge = make_eval_step(sums)
    state = init_state(lora, tx)
    source = batches_of(config, examples, steps)
    batches = source.iterator()
    testing = BatchSource(tests, config.batch, bucket_lengths(tests, config.buckets)) if tests else None

    checkpoints = Checkpoints(out / "checkpoints", {**run_identity(config), "examples": len(examples)})
    found = checkpoints.restore(state) if config.resume else None
    if found is not None:
        state, position = found
        batches.set_state(position)
        say(f"going on at step {int(state.step)} of {steps}")
    else:
        checkpoints.clear()
    metrics = Metrics(out / "metrics.jsonl", int(state.step))

    report: dict[str, Any] = {}
    shown = [row for row in test_rows if not row.messages][: config.samples]
    if testing:
        report["before"] = judged("before", judge, lora, frozen, testing)
    written = [answer(base, base.params, row) for row in shown]

    began = time.monotonic()
    with Reporter(steps, label="training", start=int(state.step)) as bar:

        def log(record: dict[str, Any]) -> None:
            metrics.write("train", record)
            bar.update(record["step"], f"loss {record['loss']:.3f}  right {record['token_accuracy']:.0%}")

        def after(state: Any) -> bool:
            number = int(state.step)
            if testing and config.eval_every and number % config.eval_every == 0 and number < steps:
                metrics.write("eval", {"step": number, **judged("now", judge, state.trained, frozen, testing)})
            return False

        state = fit(
            step,
            state,
            frozen,
            batches,
            steps=steps,
            checkpoints=checkpoints,
            save_every=config.save_every,
            log=log,
            after=after,
        )
    say(f"trained in {time.monotonic() - began:.0f} s")
    checkpoints.close()
    if testing:
        report["after"] = judged("after", judge, state.trained, frozen, testing)
    tuned = jlora.combine(frozen, state.trained)
    report["samples"] = [
        {"prompt": row.prompt, "want": row.completion, "before": was, "after": answer(base, tuned, row)}
        for row, was in zip(shown, written, strict=True)
    ]
    for sample in report["samples"]:
        say("{prompt!r}\n  before {before!r}\n  after  {after!r} (want {want!r})".format(**sample))
    return {**report, "step": int(state.step), "trained": state.trained}


def made_by(config: TrainConfig, base: Pretrained) -> tuple[jlora.LoraConfig, Callable[[Any], tuple[Any, Any]]]:
    """(the adapter's settings, params -> (frozen, lora)): a fresh adapter, or the one to go on from."""
    if config.adapter:
        folder = config.adapter
        return read_config(folder), lambda params: load_peft(folder, params, base.tensors)[:2]
    settings, key = lora_settings(config), jax.random.key(config.seed)
    return settings, lambda params: jlora.lorafy(params, config=settings, key=key, layouts=base.layouts)


def lora_settings(config: TrainConfig) -> jlora.LoraConfig:
    """The adapter's settings under PEFT's names."""
    targets = config.targets[0] if len(config.targets) == 1 else list(config.targets)
    return jlora.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        exclude_modules=list(config.exclude),
        use_rslora=config.rslora,
        init_lora_weights=config.init,
        lora_dropout=config.dropout,
    )


def tokens_of(rows: list[Row], base: Pretrained, config: TrainConfig, name: str) -> list[Example]:
    """The rows as tokens; says how many were cut. Raises ValueError without a tokenizer."""
    if base.tokenizer is None:
        raise ValueError(f"{base.source} has no tokenizer: rows of text need tokenizer.json beside the weights")
    examples, cut = tokenise_rows(rows, base.tokenizer, config.max_length)
    if cut:
        say(f"{name}: {cut} of {len(rows)} examples were cut on the left to max_length = {config.max_length}")
    return examples


def batches_of(config: TrainConfig, examples: list[Example], steps: int) -> BatchSource:
    lengths = bucket_lengths(examples, config.buckets)
    return BatchSource(examples, config.batch, lengths, seed=config.seed, steps=steps, accumulate=config.accumulate)


def steps_of(config: TrainConfig, examples: list[Example]) -> int:
    """`steps`, or what `epochs` passes over the examples take."""
    return config.steps or max(1, round(config.epochs * batches_of(config, examples, 1).per_epoch))


def judged(name: str, judge: Any, trained: Any, frozen: Any, testing: BatchSource) -> dict[str, float]:
    """Evaluate on the held-out rows, with progress."""
    with Reporter(len(testing), label=f"evaluating {name}", every=10) as bar:

        def watched() -> Any:
            for n in range(len(testing)):
                yield testing[n]
                bar.update(n + 1)

        result = evaluate(judge, trained, frozen, watched())
    right, exact = result["first"], result["exact"]
    say(f"{name}: first token right {right:.1%}, exact answer {exact:.1%}, loss {result['loss']:.3f}")
    return result


def answer(base: Pretrained, params: Any, row: Row) -> str:
    """What the model writes after a row's prompt, greedily, as long as the wanted answer and a little more."""
    room = len(base.tokenizer(row.completion)["input_ids"]) + 6
    (text,) = generate_text(
        base.model, params, base.tokenizer, [row.prompt], GenerateConfig(max_new_tokens=min(room, 128))
    )
    return text
