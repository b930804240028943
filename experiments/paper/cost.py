"""Sections 4.2 and 5.5: memory, checkpoint and the time to switch tasks.

    python -m experiments.all cost

Memory at 175B is `jlora plan`'s arithmetic over all chips of a mesh, no program runs; switching is timed here.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.tables import Shown, Table
from experiments.paper.works import DECODER, PAPER_TARGETS
from jlora.commands.parts import keeper, made_by
from jlora.commands.settings import TrainConfig
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.plan import PlanConfig, plan


@dataclasses.dataclass(frozen=True)
class Config:
    """The mesh only divides what is summed again; 16 bits for the base as in the paper."""

    plans: tuple[tuple[str, int, str, str], ...] = (
        ("gpt3-175b", 4, "c_attn", "v5p:4x4x8"),
        ("llama-3-8b", 16, "all-linear", "v5e:2x4"),
        ("smollm2-135m", 8, "all-linear", "v5e:1"),
    )
    """Model, rank, targets, topology."""
    methods: tuple[str, ...] = ("full", "lora")
    repeats: int = 10


SMALL = Config(plans=(("smollm2-135m", 8, "all-linear", "v5e:1"),), repeats=2)


def memory(model: str, rank: int, targets: str, topology: str, method: Any, done: Results) -> dict[str, Any]:
    rows = 128 if model.startswith("gpt3") else 8
    shape = {"batch": rows, "seq": 1024 if model.startswith("gpt3") else 2048}
    found = plan(PlanConfig(model, topology, method, rank, (targets,), **shape))
    chips, each = int(found["topology"].split("(")[1].split(" ")[0]), found["GB_a_device"]
    states = sum(each[kind] for kind in ("base", "trained", "optimiser", "gradients"))
    return {
        "trained": found["parameters"]["trained"],
        "parameters": found["parameters"]["base"],
        "states, GB": states * chips,
        "step, GB": each["total"] * chips,
        "chips": chips,
        "checkpoint, MB at 16 bits": found["adapter_MB_at_16_bits"],
    }


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of `run`, after one that is not counted."""
    took = []
    for n in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        took += [1e3 * (time.perf_counter() - began)] if n else []
    return statistics.median(took)


def switching(config: Config, done: Results) -> dict[str, Any]:
    """Milliseconds to go from one task's adapter to another's, rank 8 on q and v, SmolLM2-135M in float32."""
    base = load(DECODER)
    settings = TrainConfig(DECODER, "none", **PAPER_TARGETS[DECODER])
    what, make = made_by(settings, base)
    frozen, first = make(base.params)
    drawn = lambda seed: jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(seed), x.shape), first)
    one, two = drawn(0), drawn(1)
    merge = jax.jit(jlora.merge)
    merged = merge(frozen, one)
    # the paper's way: subtract one BA, add the other; what is swapped in place is donated
    minus = lambda tree: jax.tree.map(lambda e: dataclasses.replace(e, scaling=-e.scaling), tree, is_leaf=is_entry)
    swap = jax.jit(lambda params, old, new: adding(adding(params, minus(old)), new), donate_argnums=0)
    held = [merged]

    def swapped() -> Any:
        held[0] = swap(held[0], one, two)
        return held[0]

    with tempfile.TemporaryDirectory() as folder:
        place = keeper(settings, base, what, first)(Path(folder) / "adapter", one)
        size = sum(file.stat().st_size for file in place.iterdir())
        return {
            "put two factors where two were": median_ms(lambda: jlora.combine(frozen, two), config.repeats),
            "read an adapter from disk": median_ms(lambda: load_adapter(base, place)[1], config.repeats),
            "merged: subtract one, add the other": median_ms(swapped, config.repeats),
            "merged: merge anew": median_ms(lambda: merge(frozen, two), config.repeats),
            "read the whole model": median_ms(lambda: load(DECODER).params, max(2, config.repeats // 5)),
            "adapter, MB": size / 1e6,
            "model in float32, MB": jlora.tree.nbytes(base.params) / 1e6,
        }


def is_entry(x: Any) -> bool:
    return isinstance(x, jlora.lora.LoraFactors)


def adding(params: Any, adapter: Any) -> Any:
    """Plain weights with an adapter added."""
    entries = jlora.tree.paths(adapter, is_entry)
    one = lambda keys, w: merged_one(w, entries.get(jlora.tree.path_of(keys)))
    return jax.tree_util.tree_map_with_path(one, params)


def merged_one(w: Any, entry: Any) -> Any:
    return w if entry is None else w + entry.attach(jnp.zeros_like(w), "").materialise()


def cells(config: Config) -> list[Cell]:
    planned = [
        Cell(f"plan/{model}/{method}", functools.partial(memory, model, rank, targets, topology, method))
        for model, rank, targets, topology in config.plans
        for method in config.methods
    ]
    return [*planned, Cell("switching", functools.partial(switching, config))]


def show(config: Config, done: Results) -> Shown:
    rows = []
    for model, rank, targets, _ in config.plans:
        for method in config.methods:
            held = done.get(f"plan/{model}/{method}")
            if not held:
                continue
            what = "full" if method == "full" else f"LoRA r = {rank}, {targets}"
            figures = [f"{held[key]:,.1f}" for key in ("states, GB", "step, GB", "checkpoint, MB at 16 bits")]
            rows.append([model, what, f"{held['trained']:,}", *figures, str(held["chips"])])
    note = (
        "By plan, over all chips: states are the base, what trains, its gradients and Adam's moments (all in 16 bits, "
        "factors in 32; what every chip holds counts on each); a step adds activations and temporaries."
    )
    head = ["model", "method", "trained", "states, GB", "step, GB", "checkpoint, MB", "chips"]
    tables = [Table(head, rows, note)]
    if "switching" in done:
        held = {what: value for what, value in done["switching"].items() if what != "seconds"}
        times = [
            [what, f"{ms:.2f}" if ms < 1 else f"{ms:,.1f}"] for what, ms in held.items() if not what.endswith("MB")
        ]
        sizes = [[what.removesuffix(", MB"), f"{mb:,.1f}"] for what, mb in held.items() if what.endswith("MB")]
        note = (
            f"SmolLM2-135M in float32, LoRA of r = 8 on q and v. Medians of {config.repeats} (of the whole model's "
            f"reading {max(2, config.repeats // 5)}); a shared machine."
        )
        tables += [
            Table(["to switch a task", "ms"], times, note),
            Table(["what is read", "MB"], sizes, "Sizes of what is read."),
        ]
    return Shown(tables)


EXPERIMENT = Experiment("cost", "Sections 4.2 and 5.5: memory, checkpoints, switching", Config(), SMALL, cells, show)
