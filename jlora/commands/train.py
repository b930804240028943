"""`jlora train`: model, rows and settings in; adapter, metrics and report out. `jlora demo` is this with a preset."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora.commands.data import statistics
from jlora.commands.dry import describe
from jlora.commands.examine import Examiner
from jlora.commands.folder import empty, refuse_used, run_folder, told
from jlora.commands.html import write_page
from jlora.commands.parts import going_on, keeper, made_by, rows_of
from jlora.commands.report import picture, write_json
from jlora.commands.settings import FIXED, TrainConfig, check, run_identity, save_settings, say
from jlora.commands.tasks import Answers, task_of
from jlora.commands.watch import Watch
from jlora.data import Row, split_rows
from jlora.distributed import on_every_host, stopper
from jlora.io import Pretrained
from jlora.io.lock import claimed
from jlora.train import Checkpoints, TrainState, fit
from jlora.train.loop import Stop, on_sigterm
from jlora.train.metrics import text_metric
from jlora.train.report import Reporter


def train(config: TrainConfig) -> dict[str, Any]:
    """Run it. Returns {before, after (loss, exact, first ...), samples, adapter, plot}; figures on stderr as they come.

    Raises ValueError for bad settings, rows, or a resumption under other settings, FileExistsError for a folder that
    holds another run, and what `load` raises.
    """
    check(config)
    if not config.dry_run:
        refuse_used(config)
    config = going_on(config)
    for name in config.metrics:
        text_metric(name)
    train_rows, test_rows = rows_to_use(config)
    # a class may have no row but those held out of its own file
    task = task_of(config, train_rows if config.eval_data else [*train_rows, *test_rows], test_rows)
    say(f"reading {config.model}")
    base = task.load()
    examples = task.examples(train_rows, base, config.data)
    tests = task.examples(test_rows, base, config.eval_data or "held out") if test_rows else []
    if config.dry_run:
        return describe(config, task, base, made_by(config, base, task.whole)[1], examples, tests)
    with run_folder(config.output) as (out, publish), claimed(out):
        return train_in(out, publish, config, task, base, examples, tests, train_rows, test_rows)


def train_in(
    out: Path,
    publish: Callable[[], None],
    config: TrainConfig,
    task: Answers,
    base: Pretrained,
    examples: list[Any],
    tests: list[Any],
    train_rows: list[Row],
    test_rows: list[Row],
) -> dict[str, Any]:
    """`train` once everything is read, writing into `out`."""
    what, make = made_by(config, base, task.whole, lambda: task.sight(base, examples))
    frozen, lora = make(base.params)
    say(jlora.summary(frozen, lora))
    keep = keeper(config, base, what, lora)

    def save(folder: Path, trained: Any, card: dict[str, Any] | None = None) -> Path:
        keep(folder, on_every_host(trained), card)
        task.beside(folder)
        return folder

    examiner = Examiner(config, task, base, task.spread.tree(frozen), task.spread.tree(lora))
    task.fits(examiner.tuned, [*examples, *tests])
    first = jax.process_index() == 0
    mine = dataclasses.replace(config, track=config.track if first else ())
    with on_sigterm() if jax.process_count() == 1 else nullcontext(stopper()) as stop:
        examiner.ask(tests, test_rows, stop)
        watching = lambda step: Watch(mine, out, step, save, publish)
        report = run(config, task, examiner, lora, watching, examples, publish)
    card = {"data": config.data, "steps": report["step"]}
    if "after" in report:
        card |= {f"held-out {name}": f"{value:.4g}" for name, value in report["after"].items()}
    trained, records = report.pop("trained"), report.pop("records")
    report["adapter"] = told(config.output, save(out / "adapter", trained, card).name)
    try:
        report["plot"] = told(config.output, picture(records, report, out / "plot.png").name)
    except ImportError as error:
        say(f"no plot: {error}")
    data = statistics(train_rows, task.flat(examples), config.max_length, config.buckets)
    data.pop("tokens_cut")  # of examples that are cut already
    data |= {"cut": task.cut, "compiled_shapes": report.pop("shapes")}
    page = write_page(out / "report.html", report, records, dataclasses.asdict(config), data)
    report["page"] = told(config.output, page.name)
    write_json(out / "report.json", report)
    return report


def rows_to_use(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) by the settings."""
    rows = rows_of(config, config.data)
    if config.eval_data:
        return rows, rows_of(config, config.eval_data, judged=True)
    if config.held_out >= len(rows):
        raise ValueError(f"held_out = {config.held_out} leaves nothing of the {len(rows)} rows of {config.data}")
    return split_rows(rows, config.held_out, config.held_out_seed) if config.held_out else (rows, [])


def run(
    config: TrainConfig,
    task: Answers,
    examiner: Examiner,
    lora: Any,
    watching: Callable[[int], Watch],
    examples: list[Any],
    publish: Callable[[], None],
) -> dict[str, Any]:
    """Evaluate, train, evaluate. Returns {before, after, samples, pace, step, trained (the tree), records}."""
    source = task.planned(examples)
    steps, batches = len(source), source.iterator()
    state, step = task.begin(examiner.tuned, lora, steps)
    checkpoints, state = opened(config, task.digest(examples), state, batches, publish)
    watch = watching(int(state.step))
    with closing(watch.tracker):
        save_settings(
            dataclasses.replace(config, resume=False, overwrite=False, force=False), watch.out / "settings.yaml"
        )
        report, state = fitted(config, examiner, watch, task.spread.step(step), state, batches, checkpoints, steps)
    return {
        **report,
        "shapes": source.shapes,
        "samples": watch.samples(),
        "trained": on_every_host(state.trained),
        "records": watch.metrics.read(),
    }


def fitted(
    config: TrainConfig,
    examiner: Examiner,
    watch: Watch,
    step: Callable[..., Any],
    state: TrainState,
    batches: Any,
    checkpoints: Checkpoints,
    steps: int,
) -> tuple[dict[str, Any], TrainState]:
    """({before, after, best, pace, step, skipped}, the last state): `run` once everything is open."""

    def after(state: TrainState, stop: Stop) -> bool:
        number = int(state.step)
        if not examiner.testing or not config.eval_every or number % config.eval_every or number == steps:
            return False
        found = examiner.figures(f"step {number}", state.trained)
        texts = examiner.answers_now(state.trained)
        watch.sampled(number, examiner.shown, texts)
        return watch.evaluated(number, found, state.trained)

    report: dict[str, Any] = {"before": examiner.before()} if examiner.testing else {}
    if not int(state.step):
        if examiner.testing:
            watch.evaluated(0, report["before"], state.trained)
        watch.sampled(0, examiner.shown, examiner.answers(examiner.base, examiner.base.params))
    # a run that was told to end, or did, before the evaluation of its last step
    ended = watch.best.enough(config.patience) or (watch.due(int(state.step)) and after(state, examiner.stop))
    began = time.monotonic()
    with Reporter(steps, label="training", start=int(state.step)) as watch.bar:
        if not ended:
            how = {"save_every": config.save_every, "bad_steps": config.bad_steps, "keep_bad": watch.keep_bad}
            how |= {"log": watch.step, "after": after, "stop": examiner.stop, "steps": steps}
            state = fit(step, state, examiner.held, batches, checkpoints=checkpoints, **how)
    say(f"trained in {time.monotonic() - began:.0f} s; {watch.pace}")
    checkpoints.close()
    number = int(state.step)
    report |= {"step": number, "pace": watch.pace.figures(), "skipped": watch.skipped()}
    if examiner.testing:
        report["after"] = examiner.full("after", state.trained)
        if not watch.made(number):
            watch.evaluated(number, report["after"], state.trained)
        if config.eval_every:
            report["best"] = {"step": watch.best.step, "loss": watch.best.loss}
    texts = examiner.answers_now(state.trained)
    watch.sampled(number, examiner.shown, texts)
    for row, text in zip(examiner.shown, texts, strict=True):
        say(f"{row.prompt!r}\n  writes {text!r} (want {row.completion!r})")
    return report, state


def opened(
    config: TrainConfig, data: int, state: TrainState, batches: Any, publish: Callable[[], None]
) -> tuple[Checkpoints, TrainState]:
    """(checkpoints, state): the state to go on from where the run is resumed, and `batches` put there too."""
    identity = {**run_identity(config), "data_digest": data}
    defaults = run_identity(TrainConfig(config.model, config.data))
    checkpoints = Checkpoints(f"{config.output}/checkpoints", identity, before=publish, defaults=defaults)
    loose = [name for name in identity if name not in FIXED] if config.force else []
    found = checkpoints.restore(state, allow=loose) if config.resume else None
    if found is None:
        checkpoints.clear()
        if jax.process_index() == 0:
            empty(config.output)
        return checkpoints, state
    batches.set_state(found[1])
    say(f"going on at step {int(found[0].step)}")
    return checkpoints, found[0]
