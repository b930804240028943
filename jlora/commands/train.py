"""`jlora train`: model, rows and settings in; adapter, metrics and report out. `jlora demo` is this with a preset."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jlora
from jlora.commands.data import statistics
from jlora.commands.dry import describe
from jlora.commands.html import write_page
from jlora.commands.parts import (
    answer,
    batches_of,
    digest,
    first_judged,
    judged,
    keeper,
    made_by,
    objective,
    optimiser_of,
    rows_of,
    samples,
    steps_of,
    tokens_of,
)
from jlora.commands.report import picture, write_json
from jlora.commands.settings import FIXED, TrainConfig, check, run_identity, save_settings, say, scheme
from jlora.data import BatchSource, Example, Row, bucket_lengths, split_rows
from jlora.io import Pretrained, load
from jlora.methods.columns import reading
from jlora.train import Checkpoints, TrainState, fit, init_state, make_eval_step, make_train_step
from jlora.train.loop import Stop
from jlora.train.report import Best, Metrics, Pace, Reporter
from jlora.train.track import make_tracker

REMAT: dict[str, Any] = {"none": False, "full": True, "dots": "dots"}


def train(config: TrainConfig) -> dict[str, Any]:
    """Run it. Returns {before, after (loss, exact, first ...), samples, adapter, plot}; figures on stderr as they come.

    Raises ValueError for bad settings, rows, or a resumption under other settings, and what `load` raises.
    """
    check(config)
    rows = rows_of(config, config.data)
    if config.eval_data:
        train_rows, test_rows = rows, rows_of(config, config.eval_data)
    elif config.held_out >= len(rows):
        raise ValueError(f"held_out = {config.held_out} leaves nothing of the {len(rows)} rows of {config.data}")
    else:
        train_rows, test_rows = split_rows(rows, config.held_out, config.seed) if config.held_out else (rows, [])
    say(f"reading {config.model}")
    base = load(
        config.model,
        dtype=jnp.dtype(config.dtype),
        remat=REMAT[config.remat],
        weights=not config.dry_run,
        quantise=scheme(config.quantise),
    )
    wrong = {row.kind for row in (*train_rows, *test_rows)} & {"label", "preference"}
    if wrong:
        raise ValueError(
            f"{config.data} holds {wrong.pop()} rows: give `prompt` and `completion` templates of its columns"
        )
    examples = tokens_of(train_rows, base, config, config.data)
    tests = tokens_of(test_rows, base, config, config.eval_data or "held out") if test_rows else []
    what, make = made_by(config, base)
    if config.dry_run:
        return describe(config, base, make, examples, tests)
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    save_settings(dataclasses.replace(config, resume=False), out / "settings.yaml")
    frozen, lora = make(base.params)
    say(jlora.summary(frozen, lora))
    save = keeper(config, base, what, lora)
    report = run(config, base, save, frozen, lora, examples, tests, test_rows)
    card = {"data": config.data, "steps": report["step"]}
    if "after" in report:
        card |= {f"held-out {name}": f"{report['after'][name]:.4g}" for name in ("loss", "exact")}
    trained = report.pop("trained")
    report["adapter"] = str(save(out / "adapter", trained, card))
    metrics = Metrics(out / "metrics.jsonl", resume_at=report["step"]).read()
    try:
        report["plot"] = str(picture(metrics, report, out / "plot.png"))
    except ImportError as error:
        say(f"no plot: {error}")
    data = statistics(train_rows, examples, config.max_length, config.buckets)
    report["page"] = str(write_page(out / "report.html", report, metrics, dataclasses.asdict(config), data))
    write_json(out / "report.json", report)
    return report


def run(
    config: TrainConfig,
    base: Pretrained,
    save: Callable[..., Path],
    frozen: Any,
    lora: Any,
    examples: list[Example],
    tests: list[Example],
    test_rows: list[Row],
) -> dict[str, Any]:
    """Evaluate, train, evaluate. Returns {before, after, samples, step, trained (the tree)}."""
    out = Path(config.output)
    tuned = dataclasses.replace(base, model=reading(base.model, frozen, lora))
    sums = objective(config, tuned)
    steps = steps_of(config, examples)
    tx = optimiser_of(config, steps)
    step = make_train_step(sums, tx, seed=config.seed, accumulate=config.accumulate)
    judge = make_eval_step(sums)
    state = init_state(lora, tx)
    batches = batches_of(config, examples, steps).iterator()
    testing = BatchSource(tests, config.batch, bucket_lengths(tests, config.buckets)) if tests else None

    checkpoints, state = opened(config, examples, state, batches)
    metrics = Metrics(out / "metrics.jsonl", int(state.step))
    tracker = make_tracker(config.track, out, dataclasses.asdict(config), int(state.step))
    best = Best.of(metrics.read())
    shown = [row for row in test_rows if not row.messages][: config.samples]
    first = lambda rows: {"before": first_judged(config, base, tuned, judge, lora, frozen, rows)}
    report: dict[str, Any] = first(testing) if testing else {}
    written = [answer(base, base.params, row) for row in shown]

    began, pace = time.monotonic(), Pace()
    with Reporter(steps, label="training", start=int(state.step)) as bar:

        def log(record: dict[str, Any]) -> None:
            pace.step(record.pop("seconds"), record["read"], record["places"])  # times differ when a run is repeated
            metrics.write("train", record)
            tracker.write("train", record["step"], {**record, "tokens_per_second": pace.rate})
            bar.update(record["step"], f"loss {record['loss']:.3f}  right {record['token_accuracy']:.0%}  {pace}")

        def after(state: Any, stop: Stop) -> bool:
            number = int(state.step)
            if not testing or not config.eval_every or number % config.eval_every or number == steps:
                return False
            found = judged(f"step {number}", judge, state.trained, frozen, testing, stop)
            metrics.write("eval", {"step": number, **found})
            tracker.write("eval", number, found)
            if best.better(number, found["loss"]):
                save(out / "best", state.trained, {"step": number})
            return best.enough(config.patience)

        def keep_bad(batch: Any) -> str:
            np.savez(out / "bad-batch.npz", **batch)
            return f"The batch is in {out / 'bad-batch.npz'}"

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
            bad_steps=config.bad_steps,
            keep_bad=keep_bad,
        )
    say(f"trained in {time.monotonic() - began:.0f} s")
    report["pace"] = pace.figures()
    checkpoints.close()
    if testing:
        report["after"] = judged("after", judge, state.trained, frozen, testing)
        if config.eval_every and best.better(int(state.step), report["after"]["loss"]):
            save(out / "best", state.trained)
        if config.eval_every:
            report["best"] = {"step": best.step, "loss": best.loss}
    report["samples"] = samples(tuned, jlora.combine(frozen, state.trained), shown, written)
    tracker.close()
    return {**report, "step": int(state.step), "trained": state.trained}


def opened(config: TrainConfig, examples: list[Example], state: TrainState, batches: Any) -> tuple[Checkpoints, Any]:
    """(checkpoints, state): the state to go on from where the run is resumed, and `batches` put there too."""
    run = {**run_identity(config), "data_digest": digest(examples)}
    checkpoints = Checkpoints(Path(config.output) / "checkpoints", run)
    loose = [name for name in run if name not in FIXED] if config.force else []
    found = checkpoints.restore(state, allow=loose) if config.resume else None
    if found is None:
        checkpoints.clear()
        return checkpoints, state
    batches.set_state(found[1])
    say(f"going on at step {int(found[0].step)}")
    return checkpoints, found[0]
