"""Throughput of a batch whose rows have different adapters, against one merged model on the same batch.

    python experiments/serving/bank.py [--rows 64] [--resident 1000] [--repeats 15] [--layers 30] [--json FILE]

SmolLM2-135M's shape, random weights, rank 8 on q and v, float32: a decoding step of `rows` requests with 32 tokens in
each cache, and the reading of `rows` prompts of 16 tokens. One adapter for all rows runs as the engine does it: on
weights that it was merged into after a stretch of such steps (`jlora/serve/alone.py`); "unmerged" is that stretch, and
"the merge" what it ends with. Programs run in turn; the figures are medians, and the
ratios medians over rounds of merged / bank, so 1.00 is the merged model's throughput. "cpu" is the time of all threads,
which on a machine that others use says more than the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from paired import paired, table

import jlora
from jlora.bank import AdapterBank
from jlora.models.llama import Llama, LlamaConfig
from jlora.serve.request import Ask
from jlora.serve.sample import sampling
from jlora.serve.slots import decode, empty, prefill


class Work:
    """A decoding step, or the reading of prompts, of one tree of weights and one bank."""

    def __init__(self, model: Any, params: Any, bank: Any, rows: np.ndarray) -> None:
        self.model, self.params, self.bank, self.rows = model, params, bank, rows
        self.how = jax.device_put(sampling([Ask((0,))] * len(rows)))
        self.active = np.ones(len(rows), bool)

    def start(self, filled: int = 32, size: int = 64) -> Work:
        self.state = empty(self.model, len(self.rows), size)
        index = jnp.full(len(self.rows), filled, jnp.int32)
        self.state = dataclasses.replace(self.state, cache={**self.state.cache, "index": index})
        return self

    def step(self) -> Any:
        new, state = decode(self.model, 1, self.params, self.bank, self.state, self.active, self.rows, self.how)
        index = jnp.full(len(self.rows), 32, jnp.int32)
        self.state = dataclasses.replace(state, cache={**state.cache, "index": index})  # the same step each time
        return new

    def read(self) -> Any:
        tokens = np.tile(np.arange(16, dtype=np.int32), (len(self.rows), 1))
        counts = np.full(len(self.rows), 16, np.int32)
        return prefill(self.model, self.params, self.bank, tokens, counts, self.rows, self.how)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--resident", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = Llama(LlamaConfig(49152, 576, 1536, given.layers, 9, 3, 64, rope_theta=1e5, tie_word_embeddings=True))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    small, large = (AdapterBank(params, capacity=n) for n in (given.rows, given.resident))
    layouts = {r"layers/.*kernel": "sio"}
    _, lora = jlora.lorafy(params, 8, key=jax.random.key(1), targets=["q_proj", "v_proj"], layouts=layouts)
    lora = jax.tree.map(lambda x: np.asarray(x) + 0.01, lora)
    for n in range(given.resident):
        large.add(n, lora)
        if n < given.rows:
            small.add(n, lora)
    none = jax.tree.map(lambda _: None, params)
    each, one = np.arange(given.rows, dtype=np.int32) + 1, np.ones(given.rows, np.int32)
    spread = np.linspace(1, given.resident, given.rows).astype(np.int32)
    works = {
        "merged": Work(model, jlora.merge(params, lora), none, one),
        f"{given.rows} adapters in the batch": Work(model, params, small.tree(), each),
        "1 adapter in the batch": Work(model, small.merged(params, 0), none, one),
        "1 adapter, unmerged": Work(model, params, small.tree(), one),
        f"{given.rows} of {given.resident} resident": Work(model, params, large.tree(), spread),
    }
    same = [np.asarray(work.start().step()) for work in works.values()]
    assert all((tokens == same[0]).all() for tokens in same), "the bank's tokens are not the merged model's"
    found = {
        "a decoding step": paired({name: work.step for name, work in works.items()}, given.repeats),
        "16 tokens of prompt": paired({name: work.read for name, work in works.items()}, given.repeats),
        "the merge": paired({"of 1 adapter": lambda: small.merged(params, 0)}, given.repeats),
    }
    print(f"{jax.devices()[0].device_kind}, {given.rows} rows, {given.layers} layers, {given.repeats} rounds\n")
    for what, figures in found.items():
        rows = [
            [name, *(f"{f[key]:.0f}" for key in ("ms", "least", "cpu")), f"{f['ratio']:.2f}", f"{f['cpu_ratio']:.2f}"]
            for name, f in figures.items()
        ]
        head = [what, "ms, median", "least", "cpu ms", "of merged's throughput", "by cpu time"]
        alone = len(head) - 2 if what == "the merge" else len(head)
        print(table(head[:alone], [row[:alone] for row in rows]), end="\n\n")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
