"""What a compiled program sends over the wires: each collective with its bytes and how often it runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import ml_dtypes
import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
CYCLES = re.compile(r'estimated_cycles"?:\s*"(\d+)"')
ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
"""Groups by the axes of a mesh, as JAX 0.12 writes them: mesh['data'=8,'expert'=1] {'expert'}."""
CHANNEL = re.compile(r"channel_id=(\d+)")
OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """`bytes`: of the result, on one device, once. `times`: how often a step runs it (its loops' trip counts).

    `known`: False if a loop around it has no known trip count; `times` then counts that loop once.
    """

    kind: str
    dtypes: tuple[str, ...]
    bytes: int
    times: int
    known: bool
    where: str

    @property
    def total(self) -> int:
        return self.bytes * self.times


def collectives(text: str) -> list[Collective]:
    """The collectives in a compiled program's text (`compiled.as_text()`), loop bodies multiplied out."""
    found: dict[str, Collective] = {}
    for shape, opcode, rest, times, known, inside in instructions(text):
        kind = opcode.removesuffix("-start")
        if kind not in KINDS or alone(rest):
            continue
        arrays = ARRAY.findall(shape)
        if opcode.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
            arrays = arrays[1:2]  # (operand, result, ...)
        place = OP_NAME.search(rest)
        size = sum(int(itemsize(dtype) * volume(dims)) for dtype, dims in arrays)
        dtypes = tuple(sorted({dtype for dtype, _ in arrays}))
        one = Collective(kind, dtypes, size, times, known, place[1] if place else "")
        # the TPU compiler spreads one transfer over several fusions and writes it in each, under one channel; outside
        # of fusions many transfers may have one channel
        channel = CHANNEL.search(rest) if inside else None
        name = channel[1] if channel else f"alone {len(found)}"
        if name not in found or times < found[name].times:
            found[name] = one
    return list(found.values())


def alone(rest: str) -> bool:
    """Whether the groups are of one device each: nothing is sent."""
    if named := NAMED.search(rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'", named[2])
        return bool(axes) and all(sizes[axis] == "1" for axis in axes)
    return ALONE.search(rest) is not None


def cycles(text: str) -> int:
    """The TPU compiler's own `estimated_cycles`, summed over a step; 0 where a backend writes none."""
    total = 0
    for _, _, rest, times, *_ in instructions(text, fused=False):
        found = CYCLES.search(rest)
        total += int(found[1]) * times if found else 0
    return total


def instructions(text: str, fused: bool = True) -> Iterator[tuple[str, str, str, int, bool, bool]]:
    """(shape, opcode, the rest of the line, how often a step runs it, whether that is known, whether it is in a fusion)
    for each instruction.

    fused: enter what fusions and reducers call, too.
    """
    bodies, entry = computations(text)
    stack = [(entry, 1, True, False)]
    while stack:
        name, times, known, inside = stack.pop()
        for line in bodies.get(name, ()):
            match = INSTRUCTION.match(line)
            if match is None:
                continue
            shape, opcode, rest = match.groups()
            yield shape, opcode, rest, times, known, inside
            if not fused and opcode not in ("while", "conditional", "call"):
                continue
            inner = CALLED.findall(rest)
            for group in BRANCHES.findall(rest):
                inner += re.findall(r"[\w.\-]+", group)
            trips = trip_count(rest, bodies) if opcode == "while" else 1
            told, deeper = known and trips is not None, inside or opcode == "fusion"
            stack += [(child, times * (trips or 1), told, deeper) for child in inner]


def trip_count(rest: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a while loop runs: as annotated, or from a condition that compares a counter with one constant (JAX
    counts scans from 0 by 1). None if neither tells."""
    told = TRIPS.search(rest)
    if told:
        return int(told[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    lines = bodies.get(condition[1], []) if condition else []
    constants = [found[1] for line in lines if (found := re.search(r" constant\((\d+)\)", line))]
    counted = any("compare(" in line and "direction=LT" in line for line in lines)
    return int(constants[0]) if counted and len(constants) == 1 else None


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({computation: its lines}, the entry's name)."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        start = COMPUTATION.match(line)
        if start:
            name = start[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def volume(dims: str) -> int:
    return int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64)) if dims else 1


def itemsize(dtype: str) -> float:
    """Bytes of one element of an HLO type: bf16, f32, s8, pred ..."""
    bits = re.search(r"\d+", dtype)
    if dtype == "pred" or bits is None:
        return 1
    if dtype.startswith("f8"):
        return np.dtype(ml_dtypes.float8_e4m3fn).itemsize
    return max(int(bits[0]), 4) / 8


def by_kind(found: list[Collective]) -> dict[str, int]:
    """{kind: bytes a step}, on one device."""
    out: dict[str, int] = {}
    for one in found:
        out[one.kind] = out.get(one.kind, 0) + int(one.total)
    return out
