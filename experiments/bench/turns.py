"""Contestants in turn: A B A B ..., each in a process of its own that waits while another works."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench.config import CONTESTANTS, ROOT, Case, Contestant
from experiments.bench.peers import python_of


class Refused(Exception):
    """A contestant that did not start, with the last line of what it said."""


class Process:
    """A contestant that is ready to step. `facts`: what it said of itself."""

    def __init__(self, name: str, contestant: Contestant, case: Case, folder: Path):
        given = {
            "module": contestant.module,
            "case": dataclasses.asdict(case),
            "folder": str(folder),
            "options": dict(option.split("=") for option in contestant.options),
        }
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        self.name = name
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            [python_of(contestant.env), "-W", "ignore", "-m", "experiments.bench.worker", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
            env=env,
            cwd=ROOT,
        )
        self.facts = self.read()["ready"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.words.seek(0)
            said = [line.strip() for line in self.words.read().splitlines() if line.strip()]
            told = [line for line in said if "Error" in line] or said
            raise Refused(told[-1][:300] if told else f"exit {self.process.returncode}, nothing said")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> int:
        """Peak resident bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self.read()["peak"]
        self.process.wait()
        return peak


def in_turn(names: Sequence[str], case: Case, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """{name: {wall, cpu (a list of seconds each), loss (the last), peak, and its facts}, or {refused: why}}."""
    out: dict[str, dict[str, Any]] = {}
    ready: list[Process] = []
    for name in names:
        try:
            ready.append(Process(name, CONTESTANTS[name], case, folder))
            out[name] = {**ready[-1].facts, "wall": [], "cpu": []}
        except Refused as why:
            out[name] = {"refused": str(why)}
        print(f"  {name}: {out[name].get('refused') or 'ready'}", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for process in ready:
            record = process.step()
            for key in ("wall", "cpu"):
                out[process.name][key].append(record[key])
            out[process.name]["loss"] = record["loss"]
    for process in ready:
        out[process.name]["peak"] = process.end()
    return out
