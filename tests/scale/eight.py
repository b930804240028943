"""Eight simulated devices against one: run in a process of its own, it prints one JSON object for each argument,
MESH[/MIN_SIZE[/FAMILY/METHOD]]: "data=8/1000000", "fsdp=4,tensor=2/0/gpt2/dora"; or "ring/SIGHT", attention alone.
"""

import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import jlora
from jlora import batch_parts, sharding
from jlora.collectives import collectives
from jlora.data.labels import Labelled, LabelSource
from jlora.methods.columns import reading
from jlora.methods.named import MethodConfig, make
from jlora.models.attention import plain
from jlora.models.bert import Bert, BertConfig
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.models.gemma import Gemma, GemmaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.ring import ring
from jlora.train import answer_sums, init_state, make_train_step
from jlora.train.labels import label_sums
from jlora.train.preference import PairSource, preference_sums
from tests.models.test_attention import SIGHTS, drawn, out_and_grads

CONFIG = LlamaConfig(96, 32, 64, 3, 4, 2, 8)
MODELS = {
    "llama": Llama(CONFIG, remat=True),
    "gpt2": GPT2(GPT2Config(96, 64, 32, 3, 4), remat=True),
    "gemma": Gemma(GemmaConfig(96, 32, 64, 3, 4, 2, 8, 8.0, 6, (True, False, True)), remat=True),
    "bert": Bert(BertConfig(96, 32, 64, 3, 4, num_labels=3), head="classify"),
    "deberta": Deberta(
        DebertaConfig(96, 32, 64, 3, 4, position_buckets=4, norm_rel_ebd=True, num_labels=3), head="classify"
    ),
}
LAYOUTS = {"(layers?|h)/.*kernel": "sio"}
ROWS, LENGTH = 16, int(os.environ.get("LENGTH", "12"))


def examples(rng, count, shortest=3):
    """Random tokens, the last two of which are an answer; types and a label for an encoder."""
    for n in range(count):
        size = int(rng.integers(shortest, LENGTH + 1))
        tokens = rng.integers(1, 96, size).astype(np.int32)
        yield Labelled(tokens, np.arange(size) >= size - 2, np.zeros(size, np.int32), n % 3)


def batches(count, method="lora"):
    rng = np.random.default_rng(0)
    for _ in range(count):
        if method == "labels":
            yield LabelSource(list(examples(rng, ROWS - 1)), ROWS, [LENGTH])[0]
            continue
        if method in ("dpo", "orpo"):
            some = list(examples(rng, 2 * ROWS - 2))
            yield PairSource(list(zip(some[::2], some[1::2], strict=True)), ROWS, [LENGTH])[0]
            continue
        size = ROWS * 3
        positions = np.concatenate([n * LENGTH + np.sort(rng.choice(LENGTH, 3, replace=False)) for n in range(ROWS)])
        yield {
            "tokens": rng.integers(0, 96, (ROWS, LENGTH)).astype(np.int32),
            "mask": np.ones((ROWS, LENGTH), bool),
            "positions": positions.astype(np.int32),
            "labels": rng.integers(0, 96, size).astype(np.int32),
            "example": np.repeat(np.arange(ROWS), 3).astype(np.int32),
            "weights": (np.arange(size) % 7 != 0).astype(np.float32),
        }


def setting(family="llama", method="lora"):
    """(frozen, trained, objective, optimiser); Adam blows rounding up where a gradient is 0, as in some methods."""
    model = MODELS[family]
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    if method == "qlora":
        params = jlora.quant.quantise(params, "nf4", layouts=LAYOUTS)
    other = ("qlora", "labels", "dpo", "orpo")
    config = MethodConfig("lora" if method in other else method, rank=4, alpha=4, virtual_tokens=4, dimension=50)
    whole = ("classifier",) if method == "labels" else ()
    frozen, trained = make(params, config, layouts=LAYOUTS, train=whole, key=jax.random.key(1))
    tx = optax.adamw(1e-2) if method == "lora" else optax.sgd(0.1)
    if method in ("dpo", "orpo"):
        return frozen, trained, preference_sums(model, method), tx
    if method == "labels":
        lifted = jlora.lift(label_sums(model, False))
        return frozen, trained, lambda trained, frozen, batch, key: lifted(jlora.combine(frozen, trained), batch), tx
    lifted = jlora.lift(answer_sums(reading(model, frozen, trained)), strict=method == "lora")
    return frozen, trained, lambda trained, frozen, batch, key: lifted(jlora.combine(frozen, trained), batch), tx


def off(want, got):
    """The largest relative difference of two lists of `Sums`; a sum may be 0."""
    return float(np.max(np.abs(np.subtract(want, got)) / np.maximum(np.abs(want), 1)))


@functools.cache
def alone(steps, family="llama", method="lora"):
    """(losses, adapter) of one device."""
    frozen, lora, sums, tx = setting(family, method)
    step, state = make_train_step(sums, tx), init_state(lora, tx)
    losses = []
    for batch in batches(steps, method):
        state, (got, _) = step(state, frozen, batch)
        losses.append([float(x) for x in got])
    return losses, jax.device_get(state.trained)


def sharded(text, steps, min_size=0, family="llama", method="lora"):
    """(losses, adapter, collectives of the step, how the leaves lie, how often the step was compiled)."""
    mesh = sharding.make_mesh(text)
    frozen, lora, sums, tx = setting(family, method)
    state = init_state(lora, tx)
    spec = sharding.specs(lora, LAYOUTS, mesh, min_size=min_size)
    at = state._replace(trained=spec, opt_state=sharding.like(state.opt_state, lora, spec), step=P())
    frozen_spec = sharding.specs(frozen, LAYOUTS, mesh, min_size=min_size)
    frozen = sharding.place(frozen, frozen_spec, mesh)
    state = sharding.place(state, at, mesh)
    lies = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(batch_parts.over_batch(sums, mesh), tx, lies=lies)
    losses, text = [], ""
    for batch in batches(steps, method):
        parts = batch_parts.split_batch(batch, mesh)
        parts = sharding.place(parts, batch_parts.batch_specs(parts), mesh)
        text = text or step.lower(state, frozen, parts).compile().as_text()
        state, (got, _) = step(state, frozen, parts)
        losses.append([float(x) for x in got])
    return losses, state, collectives(text), jax.tree.map(str, jlora.tree.paths(frozen_spec)), step._cache_size()


def around(name):
    """Largest errors of the ring's output and gradients, in tiles that do not divide a device's tokens."""
    arrays, sight = drawn(**SIGHTS[name])
    mesh = sharding.make_mesh("sequence=4,tensor=2")
    attention = lambda *args: ring(*args, mesh, 24)
    pairs = zip(out_and_grads(plain, arrays, sight), out_and_grads(attention, arrays, sight), strict=True)
    return [float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs]


def main():
    steps = 3
    for text in sys.argv[1:]:
        if text.startswith("ring/"):
            print(json.dumps({"mesh": text, "off": around(text[5:])}), flush=True)
            continue
        name, small, *what = [*text.split("/"), "0"] if "/" not in text else text.split("/")
        losses, adapter = alone(steps, *what)
        mine, state, moved, spec, compiled = sharded(name, steps, int(small), *what)
        pairs = zip(jax.tree.leaves(adapter), jax.tree.leaves(jax.device_get(state.trained)), strict=True)
        report = {
            "mesh": text,
            "losses": off(losses, mine),
            "adapter": max(float(np.max(np.abs(a - b))) for a, b in pairs),
            "adapter_bytes": jlora.tree.nbytes(adapter),
            "collectives": [[c.kind, list(c.dtypes), c.total, c.known, c.where] for c in moved],
            "specs": spec,
            "compiled": compiled,
            "state_split": any(x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(state.opt_state)),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
