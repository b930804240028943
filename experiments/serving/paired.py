"""Programs timed in turn (A B C A B C ...), so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Times = dict[str, list[float]]
"""Milliseconds of every round, by program."""


def rounds(programs: dict[str, Callable[[], Any]], repeats: int) -> tuple[Times, Times]:
    """(by the clock, CPU time of all threads), after one round that is not counted."""
    wall: Times = {name: [] for name in programs}
    cpu: Times = {name: [] for name in programs}
    for run in programs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in programs.items():
            began, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            wall[name].append(1e3 * (time.perf_counter() - began))
            cpu[name].append(1e3 * (time.process_time() - used))
    return wall, cpu


def paired(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """{name: figures}; ms: the median, least: the smallest, cpu: median CPU time of all threads, ratio and cpu_ratio:
    the median over rounds of the first program's time divided by this one's (above 1: faster than the first).
    """
    wall, cpu = rounds(programs, repeats)
    first = next(iter(programs))
    ratio = lambda times, name: float(np.median(np.array(times[first]) / np.array(times[name])))
    return {
        name: {
            "ms": float(np.median(wall[name])),
            "least": min(wall[name]),
            "cpu": float(np.median(cpu[name])),
            "ratio": ratio(wall, name),
            "cpu_ratio": ratio(cpu, name),
        }
        for name in programs
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
