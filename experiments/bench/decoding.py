"""What a token costs beside the weights: a decoding step as its room grows, timed here and compiled for a TPU.

python -m experiments.bench.decoding                       # SmolLM2-135M on this device
python -m experiments.bench.decoding --topology v5e:2x4    # Llama 3.2 1B's shapes, by the TPU compiler alone
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

ROWS, PROMPT, STEPS = 16, 32, 20
ROOMS = (256, 1024, 4096)


def timed() -> Iterator[dict[str, Any]]:
    """Milliseconds a greedy token takes SmolLM2-135M with a LoRA of rank 8, one row, for each room."""
    import jax
    import jax.numpy as jnp

    import jlora
    from jlora.generate import GenerateConfig, start_jit, step_jit
    from jlora.io import load

    base = load("smollm2-135m-instruct")
    params = jlora.combine(*jlora.lorafy(base.params, 8, layouts=base.layouts))
    tokens = jnp.arange(PROMPT)[None]
    mask = jnp.ones(tokens.shape, bool)
    for room in ROOMS:
        how = GenerateConfig(max_new_tokens=room - PROMPT)
        state = start_jit(base.model, how.max_new_tokens, params, tokens, mask, jax.random.key(0))
        state = jax.block_until_ready(step_jit(base.model, how, params, state))
        began = time.perf_counter()
        for _ in range(STEPS):
            state = step_jit(base.model, how, params, state)
        jax.block_until_ready(state.logits)
        yield {"room": room, "milliseconds": round((time.perf_counter() - began) / STEPS * 1e3, 1)}


def compiled(topology: str, room: int) -> dict[str, Any]:
    """What the TPU compiler says of a step of `ROWS` rows: bytes of temporaries and of the cache, estimated cycles."""
    from jlora.plan.tpu import compile_step, devices_of

    device = devices_of(topology)[0]  # first: it says how libtpu is to start

    import jax
    import jax.numpy as jnp

    from jlora.generate import GenerateConfig, start, step
    from jlora.models.llama import Llama, LlamaConfig

    config = LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True)
    model = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    tokens, mask = jnp.zeros((ROWS, PROMPT), jnp.int32), jnp.ones((ROWS, PROMPT), bool)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])
    state = jax.eval_shape(lambda p: start(model, room - PROMPT, p, tokens, mask, jax.random.key(0)), params)
    one = jax.jit(lambda p, s: step(model, GenerateConfig(), p, s), donate_argnums=1)
    told = compile_step(one, jax.tree.map(place, params), jax.tree.map(place, state))
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache["kv"]))
    return {
        "room": room,
        "cache": cache,
        "temporaries": told["temporaries"],
        "estimated_cycles": told["estimated_cycles"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="compile for this TPU instead of running here")
    given = parser.parse_args()
    for told in (compiled(given.topology, room) for room in ROOMS) if given.topology else timed():
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
