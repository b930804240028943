"""One program on every host: who the others are, and what to do when one is lost."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost; the others then end."""

LOST = re.compile(r"[Gg]loo|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|[Hh]eartbeat|coordination|[Cc]onnection|peer")
"""What XLA's errors say when a collective fails because a process or the network is gone."""


def launcher(env: Mapping[str, str] | None = None, devices: str = "/dev") -> str:
    """What started several processes: "JLORA_COORDINATOR", "Slurm", "Open MPI", "TPU"; "" for one process.

    A TPU machine counts even alone, as only its metadata tell how many hosts the slice has.
    """
    env = os.environ if env is None else env
    if env.get("JLORA_COORDINATOR"):
        return "JLORA_COORDINATOR"
    # an allocation of several tasks, seen from inside srun: the batch script itself is one process
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if env.get("JAX_PLATFORMS", "tpu").startswith("tpu") and has_tpu(env, devices):
        return "TPU"
    return ""


def has_tpu(env: Mapping[str, str], devices: str) -> bool:
    names = [name for folder in (devices, f"{devices}/vfio") if os.path.isdir(folder) for name in os.listdir(folder)]
    return any(re.fullmatch(r"(accel)?\d+", name) for name in names) or "," in env.get("TPU_WORKER_HOSTNAMES", "")


def start(env: Mapping[str, str] | None = None) -> None:
    """Join the other processes, before JAX is asked for anything; nothing on one host.

    JAX finds its arguments on TPU slices, under Slurm and under Open MPI; elsewhere JLORA_COORDINATOR=HOST:PORT,
    JLORA_PROCESSES and JLORA_PROCESS (0 ...) give them. Raises ValueError where one of the three is missing, and
    RuntimeError where the coordinator is not reached.
    """
    import jax

    env = os.environ if env is None else env
    found = launcher(env)
    if not found or jax.distributed.is_initialized():
        return
    options: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
    if found == "JLORA_COORDINATOR":
        given = [env.get(name, "") for name in ("JLORA_PROCESSES", "JLORA_PROCESS")]
        if not all(value.isdigit() for value in given):
            raise ValueError("JLORA_COORDINATOR needs JLORA_PROCESSES (how many) and JLORA_PROCESS (which, from 0) too")
        options |= {"coordinator_address": env["JLORA_COORDINATOR"]}
        options |= {"num_processes": int(given[0]), "process_id": int(given[1])}
    try:
        jax.distributed.initialize(**options)
    except ValueError:
        if found != "TPU":
            raise  # a TPU machine with no metadata to ask is one host


def stopper() -> Callable[[], bool]:
    """f(): whether a process of the run was told to stop (SIGTERM, a preemption notice). Of several processes all
    hear it at the same call, so that all save the same step; each must call it equally often.
    """
    from jax.experimental import multihost_utils

    calls, told = 0, False

    def stop() -> bool:
        nonlocal calls, told
        if not told:
            calls += 1
            told = bool(multihost_utils.reached_preemption_sync_point(calls))
        return told

    return stop


def on_every_host(tree: Any) -> Any:
    """`tree` as whole arrays that this process can read; every process must ask."""
    import jax

    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def from_every_process(told: bytes) -> list[bytes]:
    """What each process told, in their order; every process must ask."""
    import numpy as np
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.asarray(len(told))).tolist()
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(told)] = np.frombuffer(told, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
