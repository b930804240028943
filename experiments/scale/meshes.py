"""Every mesh shape of eight devices, every decoder family and every method against one device.

    python experiments/scale/meshes.py                       # every shape, families and methods on two: ten minutes
    python experiments/scale/meshes.py --methods             # the methods alone
    python experiments/scale/meshes.py --encoders            # labels by BERT and DeBERTa, preferences

Eight simulated CPU devices, three training steps of a tiny model in float32. Prints the largest relative difference
of the losses' sums and the largest difference of a trained number. Lines of JSON go to --out; what it holds is not run
again, so a sweep that was stopped goes on. docs/scale.md holds what was seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.methods.named import METHODS

AXES = ("data", "fsdp", "tensor", "sequence")
TWO = ("fsdp=4,tensor=2", "data=2,fsdp=2,sequence=2")


def shapes(count: int = 8) -> list[str]:
    """Every way to write `count` as a product over the axes."""
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    found = [each for each in itertools.product(sizes, repeat=len(AXES)) if math.prod(each) == count]
    return [",".join(f"{name}={n}" for name, n in zip(AXES, each, strict=True) if n > 1) for each in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("shapes", "families", "methods", "encoders"):
        parser.add_argument(f"--{name}", action="store_true", help="these alone")
    parser.add_argument("--out", default="meshes.jsonl", help="lines of JSON are added here")
    given = parser.parse_args()
    every = not (given.shapes or given.families or given.methods or given.encoders)
    asked = [f"{mesh}/0/llama/lora" for mesh in shapes()] if given.shapes or every else []
    if given.families or every:
        asked += [f"{mesh}/0/{family}/lora" for mesh in TWO for family in ("gpt2", "gemma")]
    if given.methods or every:
        others = [method for method in (*METHODS, "qlora") if method != "lora"]
        of = lambda method: "gpt2" if method == "bitfit" else "llama"  # which has no biases
        asked += [f"{mesh}/0/{of(method)}/{method}" for mesh in TWO for method in others]
    if given.encoders or every:
        asked += [f"{mesh}/0/{family}/labels" for mesh in TWO for family in ("bert", "deberta")]
        asked += [f"{mesh}/0/llama/{loss}" for mesh in TWO for loss in ("dpo", "orpo")]
    out = Path(given.out)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    held = {one["mesh"]: one for one in map(json.loads, lines)}
    with out.open("a", encoding="utf-8") as file:
        for one in run([mesh for mesh in asked if mesh not in held]):
            held[one["mesh"]] = one
            file.write(json.dumps(one) + "\n")
            file.flush()
            print(f"{one['mesh']:50} losses {one['losses']:.1e}  adapter {one['adapter']:.1e}", flush=True)
    worst = max(max(held[mesh]["losses"], held[mesh]["adapter"]) for mesh in asked)
    print(f"worst of {len(asked)}: {worst:.1e}")


def run(asked: list[str]) -> Iterator[dict[str, Any]]:
    """{mesh, losses, adapter} of each. Raises CalledProcessError if the process of eight devices fails."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["LENGTH"] = "16"  # tokens a row, which every shape divides
    command = [sys.executable, "-W", "ignore", "-m", "tests.scale.eight", *asked]
    running = subprocess.Popen(command, env=env, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    for line in running.stdout or ():
        yield {name: json.loads(line)[name] for name in ("mesh", "losses", "adapter")}
    if running.wait():
        raise subprocess.CalledProcessError(running.returncode, command)


if __name__ == "__main__":
    main()
