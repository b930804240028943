"""Two and four processes on the loopback, four devices in all, against one process with one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("count", "mesh"), [(2, "data=2,tensor=2"), (4, "fsdp=2,data=2")])
def test_several_processes_give_what_one_gives(count, mesh):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.scale.processes", str(port), str(count)]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen([*command, str(n), mesh], env=env, cwd=root, stdout=-1, stderr=-1, text=True)
        for n in range(count)
    ]
    try:
        told = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, [said[1][-2000:] for said in told]
    for out, _ in told:
        assert '{"whole rows": true}' in out
    lines = [line for line in told[0][0].splitlines() if line.startswith("{")]
    report = json.loads(lines[-1])
    assert (report["processes"], report["devices"]) == (count, 4)
    assert report["losses"] < 1e-5 and report["adapter"] < 1e-5
    assert "all-reduce" in report["kinds"]
