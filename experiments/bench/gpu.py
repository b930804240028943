"""A row for a machine with a GPU: the step of Llama-3-8B's shape in bfloat16 and its share of the GPU's peak.

Written for one GPU of 80 GB; not yet run on one.

    pip install "jlora[cuda]"
    python -m experiments.bench.gpu --peak-tflops 989 [--seq 2048 --batch 4]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from experiments.bench.contestants.jax_step import compiled
from experiments.bench.contestants.ours import batch_of
from jlora.models.llama import Llama, LlamaConfig, hf_tensors
from jlora.train import answer_sums, init_state, make_train_step

EIGHT_B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500000.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-tflops", type=float, required=True, help="the GPU's dense bfloat16 peak")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"this measures a GPU, and JAX sees {jax.default_backend()}")
    model = Llama(EIGHT_B, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=True)
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])()
    layouts = {t.path: "sio" for t in hf_tensors(EIGHT_B) if t.layer is not None and t.path.endswith("/kernel")}
    frozen, lora = jlora.lorafy(params, given.rank, layouts=layouts)
    lifted = jlora.lift(answer_sums(model), strict=True)
    tx = optax.adamw(2e-4)
    step = make_train_step(lambda lora, frozen, batch, key: lifted(jlora.combine(frozen, lora), batch), tx)
    tokens = np.random.default_rng(0).integers(0, EIGHT_B.vocab_size, (given.batch, given.seq), np.int32)
    run, facts = compiled(step, init_state(lora, tx), frozen, batch_of(tokens))
    run()
    times = []
    for _ in range(given.rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    # forward and input gradients, 4 FLOPs a weight and token; recomputation is not useful work and is not counted
    weights = sum(leaf.size for path, leaf in jlora.tree.paths(frozen).items() if "embed" not in path)
    flops = 4.0 * weights * tokens.size
    share = flops / statistics.median(times) / (given.peak_tflops * 1e12)
    print(json.dumps({"seconds": times, "mfu": share, **facts, "tokens": tokens.size}))


if __name__ == "__main__":
    main()
