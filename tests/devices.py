"""Runs of a module on eight simulated devices, in a process of their own: JAX fixes their number as it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def on_eight(module, *words, key):
    """{report[key]: report} of the JSON lines that `python -m module *words` prints."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env=env,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {report[key]: report for report in map(json.loads, done.stdout.splitlines())}
