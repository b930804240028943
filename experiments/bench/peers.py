"""The peers' virtual environments, made once beside the checkout: `.venv-bench-peers`, `.venv-bench-lorax`."""

from __future__ import annotations

import os
import subprocess
import sys

from experiments.bench.config import ENVIRONMENTS, ROOT


def python_of(env: str) -> str:
    """The interpreter of an environment of `ENVIRONMENTS`, made if need be; "" is the one that runs."""
    if not env:
        return sys.executable
    folder = ROOT / f".venv-bench-{env}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making {folder.name} (pip install {' '.join(ENVIRONMENTS[env])})", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[env]]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        (folder / "ready").touch()
    return str(python)
