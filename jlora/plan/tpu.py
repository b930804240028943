"""The real TPU compiler, asked without a TPU: `jax.experimental.topologies` and libtpu.

JAX must not have started another backend first: a child process compiles, and its parent reads one JSON object from
it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from jlora.collectives import by_kind, collectives, cycles
from jlora.plan.known import Topology, topology
from jlora.plan.setting import PlanConfig, Setting, setting

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu lets one process in, for the devices' sake; this one opens none
}


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_for(plan: PlanConfig, timeout: float = 1800) -> dict[str, Any]:
    """What the compiler says of one training step: {arguments, temporaries, outputs, aliased, code, peak (bytes a
    device), flops_loops_once, estimated_cycles, collectives (bytes a step by kind), seconds}.

    Raises ImportError without libtpu; ValueError for a GPU, or a program the compiler refuses, such as one
    that does not fit (its own words in the error).
    """
    compilable(plan.topology)
    done = subprocess.run(
        [sys.executable, "-m", "jlora.plan.tpu"],
        input=json.dumps(dataclasses.asdict(plan)),
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ValueError(f"the compiler for {plan.topology} refused: {reason(done.stderr)}")
    return json.loads(lines[-1])


def reason(text: str) -> str:
    """The line of a compiler's complaint that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"RESOURCE_EXHAUSTED|Ran out of memory|lockfile|Error:", line)]
    return (told or lines or ["it said nothing"])[-1][:600]


def compiled(plan: PlanConfig, step: Callable[[PlanConfig, Setting], Any] | None = None) -> dict[str, Any]:
    """`compile_for` in this process, under `ENVIRONMENT`. step: makes another training step of the same arguments."""
    from jlora.batch_parts import batch_specs
    from jlora.sharding import place

    run = setting(plan, devices_of(plan.topology))
    state, frozen, batch = (
        place(tree, spec, run.mesh)
        for tree, spec in (
            (run.state, run.state_specs),
            (run.frozen, run.frozen_specs),
            (run.batch, batch_specs(run.batch)),
        )
    )
    return compile_step(run.step if step is None else step(plan, run), state, frozen, batch)


def compilable(name: str) -> Topology:
    """The topology. Raises ValueError for a GPU, ImportError without libtpu."""
    where = topology(name)
    if not where.compiler:
        raise ValueError(f"{name} is no TPU: GPUs are planned by formula")
    if not available():
        raise ImportError('compiling for a TPU needs libtpu: pip install "jlora[tpu]"')
    return where


def devices_of(name: str) -> list[Any]:
    """The devices of a TPU topology as the compiler knows them; none needs to be here. Raises as `compilable` does."""
    from jax.experimental import topologies

    where = compilable(name)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=where.compiler).devices[: where.devices]


def compile_step(step: Any, *arguments: Any) -> dict[str, Any]:
    """The figures of `compile_for`, of a jitted step and its arguments as shapes that are laid out."""
    import time

    from jlora.compiled import none_kept

    began = time.monotonic()
    with none_kept():
        program = step.lower(*arguments).compile()
    memory, text = program.memory_analysis(), program.as_text() or ""
    held = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    peak = held["arguments"] + held["temporaries"] + held["outputs"] - held["aliased"] + held["code"]
    return {
        **held,
        "peak": peak,
        "flops_loops_once": (program.cost_analysis() or {}).get("flops"),
        "estimated_cycles": cycles(text),
        "collectives": by_kind(collectives(text)),
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    given = json.load(sys.stdin)
    for name in ("targets", "compare"):
        given[name] = tuple(given[name])
    print(json.dumps(compiled(PlanConfig(**given))))
