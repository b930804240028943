"""Waiting for what another thread or process does."""

import time


def until(true, seconds=120):
    """Wait until `true()`; it fails where that takes longer."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"it did not come true in {seconds} s"
        time.sleep(0.01)
