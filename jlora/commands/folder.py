"""The run folder: local, on gs://, or, for every process but the first, a place nobody reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath


@contextmanager
def run_folder(output: str) -> Iterator[Path]:
    """A local folder to write a run's files into. Process 0's is `output`; where that is remote ("gs://...") the
    files are copied there at the end, whatever the end is, and by `publish`. Metrics of an earlier run are there to
    go on from.
    """
    first, target = jax.process_index() == 0, epath.Path(output)
    if first and not remote(output):
        Path(output).mkdir(parents=True, exist_ok=True)
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="jlora-") as name:
        if (target / "metrics.jsonl").exists():
            (Path(name) / "metrics.jsonl").write_text((target / "metrics.jsonl").read_text())
        try:
            yield Path(name)
        finally:
            if first:
                publish(Path(name), target)


def publish(folder: Path, target: Any) -> None:
    """Copy every file of `folder` to `target`, a path of etils."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            place = target / file.relative_to(folder).as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())


def remote(output: str) -> bool:
    return "://" in output
