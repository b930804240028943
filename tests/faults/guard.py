"""What every hostile input must meet: one clear error, soon, in little memory; nothing written and nothing run."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from pathlib import Path

import pytest

RAN: list[str] = []
"""Filled by the payloads of hostile files, if anything ever runs them."""
SECONDS, BYTES = 5.0, 2**30


def payload(text="ran"):
    RAN.append(text)


class Payload:
    """Pickles to a call of `payload`."""

    def __reduce__(self):
        return (payload, ("a pickle",))


def status(name):
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def listing(folder):
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in Path(folder).rglob("*"))


def too_long(*_):
    raise TimeoutError("the input was not refused in a minute")


@contextlib.contextmanager
def bounded():
    """At most `SECONDS` of processor time and `BYTES` more memory; a bomb ends as a MemoryError."""
    linux = Path("/proc/self/clear_refs").exists()
    old, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    base = 0
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        base = status("VmRSS:")
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize:") + 4 * BYTES, old[1]))
    began = time.process_time()
    try:
        yield
        assert time.process_time() - began < SECONDS
        assert not linux or status("VmHWM:") - base < BYTES
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(call, folder, says=None):
    """`call()` raises ValueError or OSError of one line, in which the regex `says` is found."""
    before = listing(folder)
    with bounded(), pytest.raises((ValueError, OSError), match=says) as caught:
        call()
    assert not isinstance(caught.value, TimeoutError)
    clear(caught.value)
    assert listing(folder) == before and not RAN


def survives(call, folder):
    """`call()` is refused as above or does its work: a changed bit may still be a good file. Whether it worked."""
    before = listing(folder)
    with bounded():
        try:
            call()
            worked = True
        except (ValueError, OSError) as error:
            assert not isinstance(error, TimeoutError)
            clear(error)
            worked = False
    assert listing(folder) == before and not RAN
    return worked


def clear(error):
    text = str(error)
    assert text.strip() and len(text) < 1200, text
    assert text.isprintable(), f"more than a line, or characters that a terminal obeys: {text!r}"
