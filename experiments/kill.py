"""Kill a training run with SIGKILL at random moments, resume each time, and compare with a run left alone.

    python experiments/kill.py run.yaml --kills 50

The settings should save often (save_every: 5) and take a few thousand short steps. Exits 1 if any byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


def start(settings: Path, output: Path) -> subprocess.Popen[str]:
    """A run that goes on from whatever lies in `output`."""
    words = [sys.executable, "-m", "jlora.cli", "train", "--config", str(settings), "--output", str(output), "--resume"]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def kill_once(settings: Path, output: Path, longest: float) -> tuple[str, bool]:
    """(the last line it said, whether it was killed): SIGKILL up to `longest` seconds after its first step's line."""
    last, timer = "", None
    with start(settings, output) as process:
        assert process.stderr
        for line in process.stderr:
            last = line.strip() or last
            if timer is None and line.startswith("training "):
                timer = threading.Timer(random.uniform(0, longest), process.kill)
                timer.start()
    code = process.returncode
    if timer:
        timer.cancel()
    if code not in (0, -9):
        raise RuntimeError(f"the run failed by itself with {code}: {last}")
    return last, code == -9


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of the adapter and the metrics."""
    names = ("adapter/adapter_model.safetensors", "metrics.jsonl")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds from the first step to the kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as place:
        alone, killed = Path(place, "alone"), Path(place, "killed")
        process = start(args.settings, alone)
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(said[-2000:])
        kills = 0
        while kills < args.kills:
            last, was_killed = kill_once(args.settings, killed, args.longest)
            if not was_killed:
                print(f"the run ended after {kills} kills: give it more steps", file=sys.stderr)
                raise SystemExit(2)
            kills += 1
            print(f"kill {kills}: {last}", flush=True)
        process = start(args.settings, killed)
        process.communicate()
        same = digest(alone) == digest(killed)
        print(f"{kills} kills; adapter and metrics {'equal bit for bit' if same else 'DIFFER'}")
        raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
