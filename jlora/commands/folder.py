"""The run folder: local, on gs://, or, for every process but the first, a place nobody reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jlora.commands.settings import TrainConfig
from jlora.train.track import RUN_ID

RECORDS = ("metrics.jsonl", "samples.jsonl", RUN_ID)
"""What a run that goes on has to know of its earlier steps."""
MADE = ("settings.yaml", "adapter", "best", "metrics.jsonl", "samples.jsonl", "report.json", "report.html", "plot.png")
MADE += ("bad-batch.npz",)
"""What a run leaves in its folder beside checkpoints."""


def refuse_used(config: TrainConfig) -> None:
    """Raises FileExistsError where a new run would take the place of one that `output` holds, unless by `overwrite`;
    ValueError where that would delete the adapter to go on from."""
    target = epath.Path(config.output)
    if config.overwrite:
        if config.adapter and Path(config.adapter).resolve().is_relative_to(Path(config.output).resolve()):
            raise ValueError(f"adapter = {config.adapter} is in {config.output}, which overwrite empties: move it")
        return
    saved = target / "checkpoints"
    begun = saved.exists() and any(path.name.isdigit() for path in saved.glob("*"))
    if config.resume and begun:
        return
    # a run that was killed before its first checkpoint is resumed at step 0
    held = [name for name in (("adapter",) if config.resume else MADE) if (target / name).exists()]
    if held or begun:
        told = ", ".join([*held[:3], *(["checkpoints"] if begun else [])])
        ways = "--resume goes on with it" if begun else "give another --output"
        raise FileExistsError(f"{config.output} holds a run ({told}): {ways}; --overwrite puts a new one in its place")


def empty(output: str) -> None:
    """Delete what a run has left in `output` beside checkpoints, and nothing else."""
    for path in (epath.Path(output) / name for name in MADE):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


@contextmanager
def run_folder(output: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """(a local folder to write a run's files into, publish). Process 0's is `output`; where that is remote ("gs://...")
    `publish()` copies there what is new, as does the end, whatever it is; elsewhere it does nothing. The `RECORDS` of
    an earlier run are there to go on from.
    """
    first, target = jax.process_index() == 0, epath.Path(output)
    if first and not remote(output):
        Path(output).mkdir(parents=True, exist_ok=True)
        yield Path(output), lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="jlora-") as name:
        for record in RECORDS:
            if (target / record).exists():
                (Path(name) / record).write_text((target / record).read_text())
        publish = publisher(Path(name), target) if first else lambda: None
        try:
            yield Path(name), publish
        finally:
            publish()


def told(output: str, name: str) -> str:
    """Where a file of the run is once it has ended: in `output`, and not in the folder that stands for a remote one."""
    return str(epath.Path(output) / name)


def publisher(folder: Path, target: Any) -> Callable[[], None]:
    """f(): copies to `target`, a path of etils, every file of `folder` that has changed since the last call."""
    sent: dict[Path, tuple[int, int]] = {}

    def publish() -> None:
        for file in sorted(folder.rglob("*")):
            if not file.is_file():
                continue
            try:
                now = (file.stat().st_mtime_ns, file.stat().st_size)
                data = None if sent.get(file) == now else file.read_bytes()
            except FileNotFoundError:  # a tracker's, gone in the meantime
                continue
            if data is not None:
                place = target / file.relative_to(folder).as_posix()
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
                sent[file] = now

    return publish


def remote(output: str) -> bool:
    return "://" in output
