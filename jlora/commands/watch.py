"""What is seen of a run while it goes: progress, metrics.jsonl, trackers, samples, the best adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jlora.commands.folder import told
from jlora.commands.settings import TrainConfig
from jlora.data import Row
from jlora.train.report import Best, Metrics, Pace, Reporter
from jlora.train.track import make_tracker


class Watch:
    """One run's in the local folder `out`, going on at `step`; `save` writes an adapter, `publish` copies what is new
    to a remote folder."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        step: int,
        save: Callable[..., Path],
        publish: Callable[[], None] = lambda: None,
    ):
        self.config, self.out, self.save, self.publish = config, out, save, publish
        self.metrics = Metrics(self.out / "metrics.jsonl", step)
        self.written = Metrics(self.out / "samples.jsonl", step)
        self.tracker = make_tracker(config.track, self.out, dataclasses.asdict(config), step)
        self.best, self.pace = Best.of(self.metrics.read()), Pace()
        self.bar: Reporter | None = None

    def step(self, record: dict[str, Any]) -> None:
        """A step of training, as `fit` logs it."""
        record = dict(record)
        self.pace.step(record.pop("seconds"), record["read"], record["places"])  # times differ when a run is repeated
        self.metrics.write("train", record)
        self.tracker.write("train", record["step"], {**record, "tokens_per_second": self.pace.rate})
        if self.bar:
            right = f"right {record['token_accuracy']:.0%}"
            self.bar.update(record["step"], f"loss {record['loss']:.3f}  {right}  {self.pace}")

    def evaluated(self, step: int, figures: dict[str, float], trained: Any) -> bool:
        """Figures of held-out rows; whether the run should end early. With `eval_every` the best adapter so far is
        kept; that of step 0 is none."""
        record: dict[str, Any] = {"step": step, **figures}
        if self.config.eval_every and step:
            record["kept"] = self.best.better(step, figures["loss"])
        if record.get("kept"):  # before its record, by which a run that goes on knows that it is saved
            self.save(self.out / "best", trained, {"step": step})
        self.metrics.write("eval", record)
        self.tracker.write("eval", step, figures)
        if record.get("kept"):
            self.publish()
        return self.best.enough(self.config.patience)

    def sampled(self, step: int, rows: list[Row], texts: list[str]) -> None:
        """What the model answers to the sample prompts at a step."""
        for row, text in zip(rows, texts, strict=True):
            self.written.write("sample", {"step": step, "prompt": row.prompt, "want": row.completion, "text": text})

    def due(self, step: int) -> bool:
        """Whether an evaluation belongs to this step, and was not made yet."""
        every = self.config.eval_every
        return every > 0 and step > 0 and step % every == 0 and not self.made(step)

    def made(self, step: int) -> bool:
        """Whether there is an evaluation of this step."""
        return any(r["kind"] == "eval" and r["step"] == step for r in self.metrics.read())

    def keep_bad(self, batch: Any) -> str:
        """Write down the batch on which a run broke."""
        np.savez(self.out / "bad-batch.npz", **batch)
        return f"The batch is in {told(self.config.output, 'bad-batch.npz')}"

    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite."""
        steps = [r for r in self.metrics.read() if r["kind"] == "train"]
        return sum(not (np.isfinite(r["loss"]) and np.isfinite(r["grad_norm"])) for r in steps)

    def samples(self) -> list[dict[str, Any]]:
        """{prompt, want, before, during (by step), after} of each prompt, as far as they were written."""
        found: dict[str, dict[str, Any]] = {}
        for r in self.written.read():
            one = found.setdefault(r["prompt"], {"prompt": r["prompt"], "want": r["want"], "before": "", "during": {}})
            if r["step"]:
                one["during"][r["step"]] = r["text"]
            else:
                one["before"] = r["text"]
        return [{**one, "after": one["during"].pop(max(one["during"]), "")} for one in found.values() if one["during"]]
