"""`profile(step, ...)`: where a compiled training step's time goes, and its memory by kind.

The step runs under `jax.profiler`; each event is an instruction of the optimised program, which is told apart by its
opcode, its operands and the scopes it was traced under. Nothing is estimated.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import tempfile
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax

from jlora.audit import signatures, wide
from jlora.leaves import is_implicit
from jlora.tree import nbytes, paths

KINDS = {
    "matmul": "products with a frozen weight, and their input gradients",
    "attention": "scores, softmax, values",
    "adapter": "the factors' products, forward and back",
    "loss": "head and loss",
    "other": "norms, activations, copies, optimiser",
}
LINE = re.compile(r"^\s*(?:ROOT )?%?(\S+) = \(?\w+\[([\d,]*)\]\S* .*?([\w\-]+)\((.*)$")
CONTAINERS = {"while", "conditional", "call"}


@dataclasses.dataclass(frozen=True)
class Profile:
    """seconds: of a step, the fastest seen; by_kind: seconds of its instructions by `KINDS`, added up over threads;
    longest: (instruction, kind, seconds, where it comes from) of the ten that take longest; bytes: by kind.
    """

    seconds: float
    by_kind: dict[str, float]
    longest: tuple[tuple[str, str, float, str], ...]
    bytes: dict[str, int]

    def __str__(self) -> str:
        total = sum(self.by_kind.values()) or 1.0
        lines = [f"a step: {self.seconds * 1e3:.1f} ms"]
        lines += [f"  {n:10} {t * 1e3:8.1f} ms  {t / total:5.1%}  {KINDS[n]}" for n, t in self.by_kind.items()]
        lines += ["memory:"] + [f"  {name:16} {size / 1e6:10,.1f} MB" for name, size in self.bytes.items()]
        lines += ["longest instructions:"]
        lines += [f"  {t * 1e3:8.1f} ms  {kind:9} {name}  {where}" for name, kind, t, where in self.longest]
        return "\n".join(lines)


def profile(step: Any, state: Any, frozen: Any, batch: Any, *, repeats: int = 3) -> Profile:
    """Run `step(state, frozen, batch)` (jitted, as `train.make_train_step` makes it; the state is donated) `repeats`
    times under the profiler, after one run that does not count."""
    program = step.lower(state, frozen, batch).compile()
    memory = program.memory_analysis()
    held = {
        "frozen weights": nbytes(frozen),
        "trained": nbytes(state.trained),
        "optimiser state": nbytes(state.opt_state),
        "batch": nbytes(batch),
        "temporaries": memory.temp_size_in_bytes if memory else 0,
    }
    state = jax.block_until_ready(program(state, frozen, batch))[0]
    times = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                began = time.perf_counter()
                state = jax.block_until_ready(program(state, frozen, batch))[0]
                times.append(time.perf_counter() - began)
        instructions = kinds_of(program.as_text() or "", frozen)
        spent = {n: s / repeats for n, s in instruction_seconds(Path(folder), instructions).items()}
    by_kind = dict.fromkeys(KINDS, 0.0)
    for name, seconds in spent.items():
        by_kind[instructions[name][0]] += seconds
    first = sorted(spent, key=spent.__getitem__, reverse=True)[:10]
    longest = tuple((name, instructions[name][0], spent[name], instructions[name][1]) for name in first)
    return Profile(min(times), by_kind, longest, held)


def instruction_seconds(folder: Path, known: Container[str]) -> dict[str, float]:
    """Seconds by `known` instruction in the trace under `folder`, all devices and threads added."""
    spent: dict[str, float] = collections.defaultdict(float)
    for file in folder.rglob("*.xplane.pb"):
        held = jax.profiler.ProfileData.from_file(str(file))  # what it yields lives as long as it
        for plane in held.planes:
            on_device = plane.name.startswith("/device:")
            for event in (event for line in plane.lines for event in line.events):
                name = event.name.split(" ")[0].lstrip("%")
                if name not in known and on_device:  # a GPU's events are called by their kernels
                    name = str(dict(event.stats).get("hlo_op"))
                if name in known:
                    spent[name] += event.duration_ns / 1e9
    return spent


def kinds_of(text: str, frozen: Any) -> dict[str, tuple[str, str]]:
    """{instruction: (one of `KINDS`, the scopes it was traced under)} of a program's text."""
    weights = {path: leaf for path, leaf in paths(frozen, is_implicit).items() if len(wide(leaf.shape)) > 1}
    shapes = set(signatures(weights))
    lines = [match.groups() for match in map(LINE.match, text.splitlines()) if match]
    dims = {name: wide(int(n) for n in size.split(",") if n) for name, size, _, _ in lines}
    found = {}
    for name, _, opcode, rest in lines:
        if opcode in CONTAINERS:
            continue
        scope = (re.search(r'op_name="([^"]*)"', rest) or ["", ""])[1]
        operands = [dims.get(operand) for operand in re.findall(r"%([\w.\-]+)", rest.split("metadata=")[0])]
        if "adapter" in scope:
            kind = "adapter"
        elif "loss" in scope:
            kind = "loss"
        elif scope.endswith(("dot_general", "conv_general_dilated")) and any(shape in shapes for shape in operands):
            kind = "matmul"
        elif re.search("attn|attention", scope, re.IGNORECASE):
            kind = "attention"
        else:
            kind = "other"
        found[name] = (kind, scope)
    return found
