"""What a person sees on stderr (a rich bar, or plain lines off a terminal) and what a program reads (metrics.jsonl)."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Metrics:
    """`path`: one JSON object a line. On resuming at step n, lines of later steps are dropped: they will come again."""

    def __init__(self, path: str | Path, resume_at: int = 0):
        self.path = Path(path)
        kept = []
        if resume_at and self.path.exists():
            for line in self.path.read_text().splitlines():
                if line.endswith("}") and json.loads(line)["step"] <= resume_at:
                    kept.append(line)
        beside = self.path.with_suffix(".part")
        beside.write_text("".join(line + "\n" for line in kept))
        beside.replace(self.path)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append {"kind": kind, **record}; `record` has a step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **record}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class Best:
    """The lowest held-out loss so far and how many evaluations have passed since."""

    def __init__(self) -> None:
        self.loss, self.step, self.since = float("inf"), 0, 0

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> Best:
        """As the evaluations among `records` left it (`kept`: whether one's adapter was kept as the best), so that a
        resumed run stops where the first would have."""
        best = cls()
        for record in records:
            if record.get("kept"):
                best.loss, best.step, best.since = record["loss"], record["step"], 0
            elif "kept" in record:
                best.since += 1
        return best

    def better(self, step: int, loss: float) -> bool:
        """Count an evaluation; whether it is the best."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        return False

    def enough(self, patience: int) -> bool:
        """Whether `patience` evaluations (0: no limit) have brought nothing better."""
        return 0 < patience <= self.since


class Pace:
    """Tokens a second, the share of tokens that is no padding, and memory, over the last `window` steps."""

    def __init__(self, window: int = 20):
        self.last: deque[tuple[float, int, int]] = deque(maxlen=window)
        self.seconds, self.tokens, self.places, self.first = 0.0, 0, 0, 0

    def step(self, seconds: float, tokens: int, places: int) -> None:
        """A step of `tokens` real tokens in `places` places. The first one of all, which compiles, is left out."""
        if self.places:
            self.last.append((seconds, tokens, places))
            self.seconds += seconds
        else:
            self.first = tokens
        self.tokens, self.places = self.tokens + tokens, self.places + places

    @property
    def rate(self) -> float:
        """Tokens a second over the window; nan before the second step."""
        return sum(step[1] for step in self.last) / sum(step[0] for step in self.last) if self.last else float("nan")

    def __str__(self) -> str:
        rate = f"{self.rate:,.0f} tok/s  " if self.last else ""
        return f"{rate}{self.tokens / max(self.places, 1):.0%} useful  {memory_in_use() / 1e9:.1f} GB"

    def figures(self) -> dict[str, float]:
        """{tokens_per_second, useful_share, peak_bytes} of the whole run so far."""
        rate = (self.tokens - self.first) / self.seconds if self.seconds else 0.0
        share = self.tokens / max(self.places, 1)
        return {"tokens_per_second": rate, "useful_share": share, "peak_bytes": float(memory_in_use())}


def memory_in_use() -> int:
    """Peak bytes of the first local device; on CPU, of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Reporter:
    """Progress with the time remaining: a live bar on a terminal, a line every `every` steps elsewhere."""

    def __init__(self, total: int, *, label: str, start: int = 0, every: int = 10, stream: TextIO | None = None):
        self.stream = stream if stream is not None else sys.stderr
        self.total, self.start, self.label, self.every = total, start, label, every
        self.began = time.monotonic()
        self.bar: Progress | None = None
        if self.stream.isatty():
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(file=self.stream))
            self.task = self.bar.add_task(label, total=total, completed=start, note="")

    def __enter__(self) -> Reporter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` are finished."""
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
        elif done % self.every == 0 or done == self.total:
            left = (time.monotonic() - self.began) / max(done - self.start, 1) * (self.total - done)
            eta = f"{int(left) // 60}:{int(left) % 60:02d} left"
            print(f"{self.label} {done}/{self.total}  {note}  {eta}".rstrip(), file=self.stream, flush=True)
