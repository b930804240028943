"""One contestant in its own process: prepares, says so, and takes a step for each line it is sent.

    python -m experiments.bench.worker '{"module": ..., "case": {...}, "folder": ..., "options": {...}}'

Lines out, JSON: {"ready": facts}, then {"wall": s, "cpu": s, "loss": x} a step, and at the end {"peak": bytes}.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np

from experiments.bench.config import Case


def say(out: Any, **record: Any) -> None:
    out.write(json.dumps(record) + "\n")
    out.flush()


def tokens_of(case: Case) -> np.ndarray:
    return np.random.default_rng(0).integers(0, min(case.vocab or 49152, 49152), (case.batch, case.seq), np.int32)


def main() -> None:
    given = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # a peer that prints must not break the protocol
    case = Case(**{**given["case"], "targets": tuple(given["case"]["targets"])})
    began = time.perf_counter()
    module = importlib.import_module(f"experiments.bench.contestants.{given['module']}")
    step, facts = module.prepare(case, given["folder"], tokens_of(case), given["options"])
    first = step()
    say(out, ready={**facts, "start": time.perf_counter() - began, "first loss": first})
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        say(out, wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, loss=loss)
    say(out, peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    out.flush()
    os._exit(0)  # runtimes that hang at exit hold up nobody


if __name__ == "__main__":
    main()
