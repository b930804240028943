"""The paper's latency table (Hu et al., table 1): a forward pass by batch and sequence, for each way to fine-tune.

    taskset -c 1 python -m experiments.all latency          # one core: its time is the clock's, were it alone
    python experiments/serving/latency.py --grid 8x128      # another grid, on the machine at hand

GPT-2 medium's shape, random weights, float32; a pass ends with the last token's hidden state, as in generating: logits
of all tokens would be 3.3 GB at 32 x 512. The ways: the model itself; LoRA (r 4 on the fused q, k and v, 0.39M numbers)
merged and factored; adapter layers as Lin et al. (L, width 224) and Houlsby et al. (H, width 111), which are the
paper's 11M; a prefix of 16 columns in each layer, which the paper does not time.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.gaps import Part, how_far
from experiments.paper.tables import Shown, Table
from experiments.serving.paired import rounds
from jlora.methods import adapter, prefix
from jlora.models.gpt2 import GPT2, GPT2Config

NAMES = {
    "base": "fine-tuned",
    "merged": "LoRA merged",
    "factored": "LoRA factored",
    "adapter L": "adapter L",
    "adapter H": "adapter H",
    "prefix": "prefix",
}
ADAPTERS = ("adapter L", "adapter H")
PAPER = {(32, 512): (2.2, 3.0), (16, 256): (5.0, 8.4), (1, 128): (20.7, 30.3)}
"""What adapters L and H take more there, in per cent."""
COLUMNS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Where a pass takes more than a minute there are fewer rounds, and LoRA merged is compared as a program only."""

    grid: tuple[tuple[int, int, int, tuple[str, ...]], ...] = (
        (32, 512, 3, ("base", *ADAPTERS)),
        (16, 256, 5, ("base", "merged", *ADAPTERS)),
        (1, 128, 41, tuple(NAMES)),
    )
    """Rows, tokens, rounds, ways that are timed."""
    width: int = 1024
    layers: int = 24
    heads: int = 16
    adapters: tuple[tuple[str, int], ...] = (("lin", 224), ("houlsby", 111))
    """Kind and width of L's and H's (`experiments/counts.py`)."""


SMALL = Config(((2, 16, 2, ("base", *ADAPTERS)), (1, 8, 3, tuple(NAMES))), 64, 2, 4, (("lin", 14), ("houlsby", 7)))


def trees(config: Config) -> tuple[Any, dict[str, Any]]:
    """(the model, the weights of each way); what is trained is not zero, as after training."""
    model: Any = GPT2(GPT2Config(n_embd=config.width, n_layer=config.layers, n_head=config.heads))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    layouts = {r"h/.*kernel": "sio"}
    nudged = lambda tree: jax.tree.map(lambda x: x + 0.01, tree)
    frozen, lora = jlora.lorafy(params, 4, alpha=32.0, targets=["c_attn"], layouts=layouts)
    lora = nudged(lora)
    made = {"base": params, "merged": jlora.merge(frozen, lora), "factored": jlora.combine(frozen, lora)}
    for way, (kind, width) in zip(ADAPTERS, config.adapters, strict=True):
        frozen, trained = adapter.make(params, width, kind=kind, layouts=layouts)
        made[way] = jlora.combine(frozen, nudged(trained))
    made["prefix"] = jlora.combine(*prefix.layer(params, COLUMNS, layouts=layouts))
    return model, made


def compiled(model: Any, way: str, tree: Any, tokens: jax.Array) -> Any:
    """The program of one way, traced for itself."""
    hidden = lambda tree, tokens, mask=None: model.apply({"params": tree}, tokens, mask=mask, method="hidden")
    if way == "prefix":
        hidden = prefix.with_prefix(hidden, COLUMNS, 0)
    last = lambda tree, tokens: hidden(tree, tokens, None)[:, -1]
    return jax.jit(jlora.lift(last, strict=True)).lower(tree, tokens).compile()


def instructions(program: Any) -> list[str]:
    """What a compiled program does, in order, without where in the sources it comes from."""
    lines = (program.as_text() or "").splitlines()
    told = [line for line in lines if re.match(r"\s*(ROOT |ENTRY )?%|HloModule", line)]
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in told]


def measure(model: Any, made: dict[str, Any], batch: int, length: int, repeats: int, ways: tuple[str, ...]) -> Any:
    """Of each way ms and CPU ms (medians), operations, and every round's time over the base's, less one."""
    tokens = jnp.ones((batch, length), jnp.int32)
    programs = {way: compiled(model, way, made[way], tokens) for way in dict.fromkeys((*ways, "merged"))}
    runs = {way: functools.partial(programs[way], made[way], tokens) for way in ways}
    wall, cpu = rounds(runs, repeats)
    more = lambda times, way: [round(a / b - 1, 5) for a, b in zip(times[way], times["base"], strict=True)]
    found = {
        way: {
            "ms": float(np.median(wall[way])),
            "CPU ms": float(np.median(cpu[way])),
            "operations": (programs[way].cost_analysis() or {}).get("flops"),
            "more": more(wall, way),
            "more CPU": more(cpu, way),
        }
        for way in ways
    }
    same = instructions(programs["merged"]) == instructions(programs["base"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": jax.devices()[0].device_kind, "cores": cores, "merged is base's program": same, "ways": found}


def cells(config: Config) -> list[Cell]:
    made = functools.cache(functools.partial(trees, config))
    one = lambda point: lambda done: measure(*made(), *point)
    return [Cell(f"{point[0]}x{point[1]}", one(point)) for point in config.grid]


def middle(values: list[float]) -> tuple[float, float, float]:
    """(median, the ends of its 95 % interval by order alone: of fewer than six values their least and most)."""
    from scipy import stats

    ordered, count = sorted(values), len(values)
    k = max(1, int(stats.binom.ppf(0.025, count, 0.5)))
    return float(np.median(ordered)), ordered[k - 1], ordered[count - k]


def show(config: Config, done: Results) -> Shown:
    rows, on = [], ""
    for batch, length, _, ways in config.grid:
        held = done.get(f"{batch}x{length}")
        if held:
            on = f", on {held['cores']} core{'s' * (held['cores'] > 1)}, {held['device']}"
            paper = dict(zip(ADAPTERS, PAPER.get((batch, length), ()), strict=False))
            for way in [name for name in NAMES if name in ways or name == "merged"]:
                rows.append([f"{batch} x {length}", *row(held, way), f"+{paper[way]} %" if way in paper else ""])
    note = (
        f"GPT-2 M's shape ({config.layers} layers of {config.width}), random weights, float32{on}; a pass up to the "
        "last token's hidden state. Programs run in turn: medians over rounds, and the median of what a way takes more "
        "than the base in a round, in brackets where that median lies with 95 % (of fewer than six rounds their least "
        "and most: 94 % of five, 75 % of three). Other work was on the machine: processor time says more than the "
        "clock. LoRA merged was compiled anew at each point and its instructions held against the base's; where a "
        "pass takes a minute it was not timed as well. Operations are XLA's count of a layer."
    )
    head = ["batch x tokens", "way", "rounds", "processor, ms", "more", "clock, ms", "more", "operations more"]
    return Shown([Table([*head, "the paper"], rows, note)])


def row(held: dict[str, Any], way: str) -> list[str]:
    """A way at a point, from its name to its operations."""
    same = way == "merged" and held["merged is base's program"]
    name, base, one = f"{NAMES[way]}{', the same program' * same}", held["ways"]["base"], held["ways"].get(way)
    if one is None:
        return [name, *[""] * 6]
    more = ["", "", ""] if way == "base" else [spread(one["more CPU"]), spread(one["more"]), operations(one, base)]
    times = [f"{one[kind]:,.0f}" for kind in ("CPU ms", "ms")]
    return [name, str(len(one["more"])), times[0], more[0], times[1], *more[1:]]


def spread(values: list[float]) -> str:
    return "{:+.1f} % ({:+.1f} to {:+.1f})".format(*(100 * x for x in middle(values)))


def operations(one: dict[str, Any], base: dict[str, Any]) -> str:
    both = one["operations"], base["operations"]
    return f"{100 * (both[0] / both[1] - 1):+.1f} %" if all(both) else ""


def measured(results: dict[str, Results]) -> dict[tuple[int, int], dict[str, Any]]:
    """The points that are there, the most tokens first."""
    done = results["latency"]
    points = sorted(((b, s) for b, s, *_ in Config().grid if f"{b}x{s}" in done), reverse=True)
    return {(b, s): done[f"{b}x{s}"] for b, s in points}


def here(results: dict[str, Results]) -> str:
    found = measured(results)
    if not found:
        return ""
    alike = [f"{b}x{s}" for (b, s), held in found.items() if held["merged is base's program"]]
    said = [f"merged, the compiled program is the base's to the letter (at {listed(alike)})"] if alike else []
    for way in ("merged", "factored", *ADAPTERS):
        timed = [(f"{b}x{s}", held["ways"][way]["more CPU"]) for (b, s), held in found.items() if way in held["ways"]]
        parts = [f"{spread(more)} at {point}" for point, more in timed]
        said += [f"{NAMES[way]} {', '.join(parts)}"] if parts else []
    return f"GPT-2 M's shape in float32 on a CPU, processor time: {'; '.join(said)}"


def listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def holds(results: dict[str, Results]) -> str:
    """Merged: the base's program everywhere. Adapters, by the intervals of the medians: dearer than the base at every
    point, and dearer with one short row than with 32 long ones.
    """
    found = measured(results)
    if not found:
        return "open"
    merged = how_far([held["merged is base's program"] for held in found.values()])
    more = {way: [middle(held["ways"][way]["more CPU"]) for held in found.values()] for way in ADAPTERS}
    parts = [beyond(point, (0.0, 0.0, 0.0)) for points in more.values() for point in points]
    parts += [beyond(points[-1], points[0]) for points in more.values() if len(points) > 1]
    layers, rest = how_far(parts), "" if len(found) == len(Config().grid) else " so far"
    return f"{merged} for merging, {layers} for adapter layers{rest}"


def beyond(one: tuple[float, float, float], other: tuple[float, float, float]) -> Part:
    """Whether one median is above another; None where their intervals meet."""
    return None if one[1] <= other[2] and other[1] <= one[2] else one[0] > other[0]


EXPERIMENT = Experiment("latency", "Table 1: what a forward pass takes", Config(), SMALL, cells, show)
