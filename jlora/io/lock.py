"""One process at a time in a folder, by POSIX record locks: the system lets go of them when a process ends, however."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
HELD: set[Path] = set()


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Hold `folder` (made if need be) for the block; a block within it, in the same process, may claim it again.

    Raises BlockingIOError, an OSError, if another process holds it. File systems without locks hold nothing.
    """
    path = Path(folder).resolve()
    path.mkdir(parents=True, exist_ok=True)
    if path in HELD:
        yield
        return
    with (path / NAME).open("a+", encoding="utf-8") as file:
        if locked(file, folder):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        HELD.add(path)
        try:
            yield
        finally:
            HELD.remove(path)


def locked(file: IO[str], folder: str | Path) -> bool:
    """Whether the system gave the lock. Raises BlockingIOError naming the process that has it."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        file.seek(0)
        who = file.read(20).strip() or "unknown"
        raise BlockingIOError(
            f"{folder} is in use by another process (number {who}): wait for it, or give another folder"
        ) from None
    except OSError:
        return False
    return True


@contextmanager
def alone(folder: Path) -> Iterator[tuple[int, ...]]:
    """Wait until no other process is in this block with the same folder.

    Gives `subprocess.run`'s pass_fds: a command that outlives this process, killed here, holds off the others too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # of the open file, which a child has too; lockf is of the process
        yield () if fcntl is None else (file.fileno(),)
