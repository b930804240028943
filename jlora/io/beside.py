"""Files that are whole or not there: written beside, onto the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def put(path: Path, data: bytes) -> None:
    """Write beside, then rename."""
    put_all({path: data})


def put_all(files: Mapping[Path, bytes]) -> None:
    """Write all beside and onto the disk, then rename all, in order: a full disk leaves what was there as it was."""
    with beside(*files) as parts:
        for (path, data), part in zip(files.items(), parts, strict=True):
            with naming(path):
                part.write_bytes(data)


@contextmanager
def beside(*paths: Path) -> Iterator[list[Path]]:
    """A place beside each of `paths` to write to. After the block they go onto the disk, then all are renamed, in
    order; a write that fails leaves none of them, and what was there as it was."""
    parts = [path.with_name(path.name + ".part") for path in paths]
    try:
        yield parts
        for path, part in zip(paths, parts, strict=True):
            with naming(path), part.open("rb") as file:
                os.fsync(file.fileno())
        for path, part in zip(paths, parts, strict=True):
            with naming(path):
                part.replace(path)
    except OSError:
        for part in parts:
            part.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A write's OSError with the file it was for: Python names one on opening, not on writing."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
