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


def test_a_remote_folder_gets_every_file_and_gives_the_metrics_back(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.commands.folder.remote", lambda output: True)
    with pytest.raises(SystemExit), run_folder(str(tmp_path / "run")) as out:
        (out / "adapter").mkdir()
        (out / "adapter" / "weights").write_bytes(b"1")
        (out / "metrics.jsonl").write_text("{}\n")
        raise SystemExit(143)
    assert (tmp_path / "run" / "adapter" / "weights").read_bytes() == b"1" and not out.exists()
    with run_folder(str(tmp_path / "run")) as out:
        assert (out / "metrics.jsonl").read_text() == "{}\n"
