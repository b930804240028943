"""SIGKILL at random moments: the resumed run ends in the bits of one left alone. experiments/kill.py does it more."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import yaml

from tests.small import rows, small_model


def test_a_killed_run_ends_in_the_same_bits(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("kill", Path(__file__).parent.parent / "experiments" / "kill.py")
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    settings = {"model": small_model(tmp_path / "model"), "data": rows(tmp_path, 24), "held_out": 8, "steps": 240}
    settings |= {"batch": 4, "buckets": 1, "save_every": 5, "eval_every": 40, "samples": 0, "learning_rate": 1e-3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    random.seed(0)
    killed = [kill.kill_once(tmp_path / "run.yaml", tmp_path / "killed", 0.5)[1] for _ in range(2)]
    assert killed[0]
    for folder in ("alone", "killed"):
        words = [sys.executable, "-m", "jlora.cli", "train", "--config", str(tmp_path / "run.yaml"), "--resume"]
        subprocess.run([*words, "--output", str(tmp_path / folder)], check=True, capture_output=True)
    assert kill.digest(tmp_path / "alone") == kill.digest(tmp_path / "killed")
