"""`jlora train` as one program of several processes: one is killed, one is told to stop, one goes on alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jlora import distributed
from jlora.cli import main
from jlora.commands.folder import run_folder
from tests.small import rows, small_model

STEPS = 80


def arguments(place, out, *more):
    settings = {"steps": STEPS, "batch": 4, "learning-rate": 0.01, "save-every": 5, "warmup": 0, "samples": 0}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["train", "--model", place["model"], "--data", place["data"], "--output", str(out), *flags, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows, and the losses of one process alone."""
    folder = tmp_path_factory.mktemp("several")
    held = {"model": small_model(folder / "model"), "data": rows(folder)}
    main(arguments(held, folder / "alone"))
    return {**held, "folder": folder, "losses": losses(folder / "alone")}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def started(count, words):
    """`count` processes of one run, a device each, their stderr in files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JLORA_COORDINATOR": f"127.0.0.1:{port}", "XLA_FLAGS": ""}
    env |= {"JLORA_PROCESSES": str(count), "TF_CPP_MIN_LOG_LEVEL": "1"}
    command = [sys.executable, "-m", "jlora.cli", *words]
    root, pipes = Path(__file__).parents[2], {"stdout": -1, "stderr": -1, "text": True}
    return [subprocess.Popen(command, env={**env, "JLORA_PROCESS": str(n)}, cwd=root, **pipes) for n in range(count)]


def after_steps(run, count, processes):
    """Wait until `count` steps are logged."""
    end = time.monotonic() + 400
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        if (run / "metrics.jsonl").exists() and len(losses(run)) >= count:
            return
        time.sleep(0.05)
    told = [process.communicate(timeout=60)[1][-2000:] for process in processes if process.poll() is not None]
    raise AssertionError(f"no {count} steps: {told}")


def ends_as_told(process):
    """`process` ends within a minute and says why: by its own sentence where a collective fails, or killed by JAX's
    runtime where it waits for the lost one until the heartbeat does."""
    _, said = process.communicate(timeout=60)
    assert process.returncode in (143, -signal.SIGABRT), said
    told = ("another process of the run is gone", "--resume") if process.returncode == 143 else ("another task died",)
    assert all(words in said for words in told), said


def test_a_process_that_hangs_ends_the_others(place):
    processes = started(2, arguments(place, place["folder"] / "hangs"))
    try:
        after_steps(place["folder"] / "hangs", 2, processes)
        processes[1].send_signal(signal.SIGSTOP)
        ends_as_told(processes[0])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_fewer(place):
    run = place["folder"] / "several"
    processes = started(2, arguments(place, run))
    try:
        after_steps(run, 12, processes)
        processes[1].kill()
        ends_as_told(processes[0])

        before = len(losses(run))
        processes += started(2, arguments(place, run, "--resume"))
        after_steps(run, before + 5, processes[2:])
        processes[3].send_signal(signal.SIGTERM)  # either hears of it
        told = [process.communicate(timeout=60) for process in processes[2:]]
        assert [process.returncode for process in processes[2:]] == [143, 143], told
        assert "going on at step" in told[0][1] and told[1][1].count("\n") < 5  # only the first speaks
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    stopped = len(losses(run))
    assert before <= stopped < STEPS and (run / "checkpoints" / str(stopped)).is_dir()
    main(arguments(place, run, "--resume"))
    np.testing.assert_allclose(losses(run), place["losses"], atol=1e-5)


def test_who_else_is_there_is_read_off_the_launcher(tmp_path):
    launcher = distributed.launcher
    nothing = str(tmp_path)
    assert launcher({}, nothing) == "" == launcher({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, nothing)
    assert launcher({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, nothing) == "Slurm"
    assert launcher({"OMPI_COMM_WORLD_SIZE": "2"}, nothing) == "Open MPI"
    assert launcher({"TPU_WORKER_HOSTNAMES": "a,b"}, nothing) == "TPU"
    (tmp_path / "accel0").write_text("")
    assert launcher({}, nothing) == "TPU" and launcher({"JAX_PLATFORMS": "cpu"}, nothing) == ""
    with pytest.raises(ValueError, match="JLORA_PROCESSES"):
        distributed.start({"JLORA_COORDINATOR": "here:1", "JLORA_PROCESS": "0"})


def test_a_remote_folder_gets_what_is_new_and_gives_the_records_back(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.commands.folder.remote", lambda output: True)
    there = tmp_path / "run"
    with pytest.raises(SystemExit), run_folder(str(there)) as (out, publish):
        (out / "adapter").mkdir()
        (out / "adapter" / "weights").write_bytes(b"1")
        (out / "metrics.jsonl").write_text("{}\n")
        publish()
        (there / "adapter" / "weights").unlink()  # is not sent again
        (out / "samples.jsonl").write_text("{}\n")
        (out / "track.id").write_text("1")
        raise SystemExit(143)
    assert {path.name for path in there.rglob("*")} == {"adapter", "metrics.jsonl", "samples.jsonl", "track.id"}
    assert not out.exists()
    with run_folder(str(there)) as (out, _):
        assert (out / "metrics.jsonl").read_text() == (out / "samples.jsonl").read_text() == "{}\n"
        assert (out / "track.id").read_text() == "1"


KILLED = """
import os, sys
from jlora.cli import main
from jlora.commands import folder, watch
folder.remote, step = lambda output: True, watch.Watch.step
def killed(self, record):
    step(self, record)
    if record["step"] == 8:
        os._exit(9)
watch.Watch.step = killed
main(sys.argv[1:])
"""


def test_a_remote_run_that_is_killed_goes_on_as_if_it_were_not(place, tmp_path, monkeypatch):
    more = ["--steps", "9", "--save-every", "2", "--eval-every", "3", "--held-out", "8", "--samples", "1"]
    main(arguments(place, tmp_path / "local", *more))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", KILLED, *arguments(place, tmp_path / "far", *more)]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    monkeypatch.setattr("jlora.commands.folder.remote", lambda output: True)
    main(arguments(place, tmp_path / "far", *more, "--resume"))
    for name in ("metrics.jsonl", "samples.jsonl", "best/adapter_model.safetensors"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
    local, far = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("local", "far"))
    assert far["samples"] == local["samples"] != [] and far["best"] == local["best"]
