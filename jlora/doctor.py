"""`jlora doctor`: is this machine ready to train? Each check says what it saw and, where it is wrong, what to do."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
GOOGLE = "0x1ae0"
"""PCI's number of the maker."""


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Check this machine: devices, versions, memory, the network between hosts, the run folder."""

    output: str = "runs"
    """The run folder that should be writable: a path, or gs://bucket/folder."""
    coordinator: str = ""
    """HOST:PORT of process 0, to see whether it can be reached from here."""


@dataclasses.dataclass(frozen=True)
class Check:
    """`saw`: the figures; `fix`: "" if all is well, else one sentence."""

    name: str
    saw: str
    fix: str = ""


def devices() -> Check:
    """JAX's devices, and whether an accelerator stands unused."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]
        return Check("devices", told, "stop the other process that holds the device, or set JAX_PLATFORMS=cpu")
    kinds = {device.device_kind for device in found}
    saw = f"{len(found)} x {', '.join(sorted(kinds))} ({found[0].platform}), process {jax.process_index()}"
    saw += f" of {jax.process_count()}"
    unused = unused_accelerator() if found[0].platform == "cpu" else ""
    return Check("devices", saw, unused)


def unused_accelerator(root: str = "/dev", pci: str = "/sys/bus/pci/devices") -> str:
    """What to install where the machine has a TPU or GPU that JAX does not use; "" if it has none."""
    names = os.listdir(root) if os.path.isdir(root) else []
    # v5e, v5p and v6e are given to programs by vfio, as other devices may be: Google's number among PCI's tells
    handed = any(entry.name.isdigit() for entry in Path(root, "vfio").glob("*"))
    makers = {file.read_text().strip() for file in Path(pci).glob("*/vendor")} if handed else set()
    if any(re.fullmatch(r"accel\d+", name) for name in names) or GOOGLE in makers:
        return 'there is a TPU here that JAX does not use: pip install "jlora[tpu]", and unset JAX_PLATFORMS'
    if any(re.fullmatch(r"nvidia\d+", name) for name in names):
        return 'there is a GPU here that JAX does not use: pip install "jlora[cuda]", and unset JAX_PLATFORMS'
    return ""


def versions() -> Check:
    """Python and the packages that must fit together."""
    names = ("jlora", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu")
    held = {}
    for name in names:
        try:
            held[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    saw = f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {version}" for name, version in held.items())
    short = {name: ".".join(held.get(name, "").split(".")[:2]) for name in ("jax", "jaxlib")}
    if short["jax"] != short["jaxlib"]:
        return Check("versions", saw, f"jax and jaxlib differ: pip install -U jax jaxlib=={held.get('jax')}")
    return Check("versions", saw)


def memory(path: str = "/proc/meminfo", least: float = 4 * GIB) -> Check:
    """The host's free memory, and each device's where it tells."""
    import jax

    told = dict(re.findall(r"(\w+):\s+(\d+) kB", Path(path).read_text())) if Path(path).exists() else {}
    free = int(told.get("MemAvailable", 0)) * 1024
    saw = f"host {free / GIB:.1f} GiB free" if told else "host: not told"
    for device in jax.local_devices()[:1]:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            saw += f", a device {stats['bytes_limit'] / GIB:.1f} GiB, {stats.get('bytes_in_use', 0) / GIB:.1f} in use"
    poor = bool(told) and free < least
    return Check("memory", saw, f"less than {least / GIB:.0f} GiB is free: close other programs" if poor else "")


def folder(output: str) -> Check:
    """Whether the run folder can be written: a small file is written and deleted. Of a disk also how much is free."""
    from etils import epath

    scheme = output.partition("://")[0] if "://" in output else ""
    place = epath.Path(output)
    try:
        made = [one for one in (place, *(() if scheme else place.parents)) if not one.exists()]
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".jlora-doctor-{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
        free = None if scheme else shutil.disk_usage(output).free
        for one in () if scheme else made:
            one.rmdir()
    except ImportError as error:
        package = "gcsfs" if scheme == "gs" else "the package named here"
        return Check("run folder", f"{output}: {error}", f"pip install {package}, which {scheme}:// paths need")
    except Exception as error:  # every backend of epath raises its own kind
        told = f"{output}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if scheme == "gs":
            fix = "gcloud auth application-default login (a VM: give its service account roles/storage.objectUser)"
        else:
            fix = "choose a folder that this user can write: --output FOLDER"
        return Check("run folder", told, fix)
    if free is None:
        return Check("run folder", f"{output}: writable")
    fix = "less than 1 GiB is free there: choose another --output" if free < GIB else ""
    return Check("run folder", f"{output}: writable, {free / GIB:.1f} GiB free", fix)


def network(coordinator: str) -> Check:
    """Whether process 0 can be reached; without an address, what launcher is seen."""
    if not coordinator:
        seen = [name for name in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES") if name in os.environ]
        return Check("network", f"{', '.join(seen) or 'one host'}: not tried (--coordinator HOST:PORT tries it)")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        return Check("network", coordinator, "write --coordinator HOST:PORT")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return Check("network", f"{coordinator}: reached")
    except OSError as error:
        fix = f"start process 0 first, and let its firewall pass TCP port {port} between the hosts"
        return Check("network", f"{coordinator}: {error}", fix)


def cache(output: str) -> Check:
    """Whether compiled programs can be kept, so that a restart is quick."""
    from jlora.compiled import keep_compiled

    found = folder(keep_compiled(output))
    fix = "give a folder that can be written, with room: export JAX_COMPILATION_CACHE_DIR=FOLDER" if found.fix else ""
    return Check("compile cache", found.saw, fix)


def run(config: DoctorConfig) -> dict[str, Any]:
    """`jlora doctor`: {ok, checks: [{name, saw, fix}]}; a check that is well has no fix."""
    every: list[Callable[[], Check]] = [
        devices,
        versions,
        memory,
        lambda: folder(config.output),
        lambda: network(config.coordinator),
        lambda: cache(config.output),
    ]
    checks = [check() for check in every]
    shown = [{name: value for name, value in dataclasses.asdict(check).items() if value} for check in checks]
    return {"ok": not any(check.fix for check in checks), "checks": shown}
