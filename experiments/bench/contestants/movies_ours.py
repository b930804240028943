"""The movie-review task by jlora's own parts. Prints JSON: {tokens, train, evaluate, compile (seconds), exact}."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

import jlora
from jlora.data import BatchSource, bucket_lengths
from jlora.data.tokens import Example
from jlora.io import load
from jlora.train import answer_sums, evaluate, init_state, make_eval_step, make_optimiser, make_train_step
from jlora.train.optimiser import OptimiserConfig


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    base = load(given["folder"], remat="dots")
    examples, tests = (
        [Example(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in given[part]]
        for part in ("train", "test")
    )
    frozen, lora = jlora.lorafy(base.params, 8, alpha=16, targets=["q_proj", "v_proj"], layouts=base.layouts)
    lifted = jlora.lift(answer_sums(base.model))
    sums = lambda lora, frozen, batch, key: lifted(jlora.combine(frozen, lora), batch)
    tx = make_optimiser(OptimiserConfig(learning_rate=given["rate"]), given["steps"])
    source = BatchSource(examples, given["batch"], bucket_lengths(examples), seed=0, steps=given["steps"])
    testing = BatchSource(tests, given["batch"], bucket_lengths(tests))
    batches, judged = [source[n] for n in range(len(source))], [testing[n] for n in range(len(testing))]
    state, step, judge = init_state(lora, tx), make_train_step(sums, tx), make_eval_step(sums)
    began = time.perf_counter()
    shape = lambda batch: str({name: array.shape for name, array in batch.items()})
    steps = {shape(b): step.lower(state, frozen, b).compile() for b in {shape(b): b for b in batches}.values()}
    judges = {shape(b): judge.lower(lora, frozen, b).compile() for b in {shape(b): b for b in judged}.values()}
    compiled = time.perf_counter()
    for batch in batches:
        state, _ = steps[shape(batch)](state, frozen, batch)
    jax.block_until_ready(state)
    trained = time.perf_counter()
    found = evaluate(
        lambda lora, frozen, batch: judges[shape(batch)](lora, frozen, batch), state.trained, frozen, judged
    )
    done = time.perf_counter()
    tokens = sum(int(batch["mask"].sum()) for batch in (*batches, *judged))
    seconds = {"compile": compiled - began, "train": trained - compiled, "evaluate": done - trained}
    print(json.dumps({"tokens": tokens, **seconds, "right": found["first"]}))


if __name__ == "__main__":
    main()
