"""python -m experiments.bench [step more qv growth starts movies] [--rounds 10] [--out bench]

Runs each comparison in turn and writes OUT/results.json, OUT/performance.md and OUT/step.png. The first run makes the
peers' virtual environments. Names left out keep the figures that OUT/results.json has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from experiments.bench.config import MORE, QV, STEP, Case
from experiments.bench.figures import matmul_peak, own_products
from experiments.bench.movies import movies
from experiments.bench.starts import starts
from experiments.bench.table import page, plot
from experiments.bench.turns import in_turn
from experiments.bench.weights import hub_folder

TOKENS = ((2, 128), (4, 128), (8, 128), (16, 128))
VOCABULARIES = (12288, 24576, 49152, 98304)
"""Rows of the embedding, with labels taken 64 at a time."""


def step(folder: Path, rounds: int, names: tuple[str, ...] = STEP, case: Case = Case()) -> dict[str, Any]:  # noqa: B008
    peaks = [matmul_peak()]
    found = in_turn(names, case, folder, rounds)
    peaks.append(matmul_peak())
    own = own_products(case.batch * case.seq)
    return {"case": dataclasses.asdict(case), "matmul_peak_gflops": peaks, "own_products": own, "contestants": found}


def growth(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds and temporaries of our step by tokens, and temporaries by vocabulary, each case in turn."""
    out: dict[str, Any] = {"tokens": {}, "vocabulary": {}}
    for batch, seq in TOKENS:
        out["tokens"][batch * seq] = in_turn(("jlora",), Case(batch=batch, seq=seq), folder, rounds)["jlora"]
    for vocab in VOCABULARIES:
        case = Case(vocab=vocab, chunk=64)
        out["vocabulary"][vocab] = in_turn(("jlora",), case, folder, rounds)["jlora"]
    return out


def machine() -> dict[str, Any]:
    import jax

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["step", "more", "qv", "growth", "starts", "movies"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="*", help="contestants of step, more or qv, by name")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    folder = hub_folder()
    among = lambda names: tuple(given.only or names)
    runs = {
        "step": lambda: step(folder, given.rounds, among(STEP)),
        "more": lambda: step(folder, given.rounds, among(MORE)),
        "qv": lambda: step(folder, given.rounds, among(QV), Case(targets=("q_proj", "v_proj"))),
        "growth": lambda: growth(folder, max(2, given.rounds // 3)),
        "starts": starts,
        "movies": lambda: movies(folder, max(2, given.rounds // 4)),
    }
    for name in given.names:
        print(name, file=sys.stderr, flush=True)
        results[name] = runs[name]()
        results["machine"] = machine()
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        beside.replace(file)
        (given.out / "performance.md").write_text(page(results))
    if "step" in results:
        plot(results, given.out / "step.png")
    print(page(results))


if __name__ == "__main__":
    main()
