"""What a few fixed training steps cost by the compiler's count, and the baseline it is held against.

    python -m tests.cost          # write tests/cost.json anew for the JAX at hand (other versions' figures stay)

Counts, not seconds: FLOPs, bytes accessed and temporaries of the step compiled for a CPU (a loop's body once), copies
and transposes of activations in it, equations of the traced step.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora.models.llama import Llama, LlamaConfig, hf_tensors
from jlora.train import answer_sums, init_state, make_train_step

BASELINE = Path(__file__).with_name("cost.json")
TOLERANCE = {"flops": 0.02, "bytes": 0.1, "temporaries": 0.1, "copies": 0.1, "equations": 0.1}
"""How much more than the baseline a figure may be: compilers for other processors differ a little."""

STEPS = {
    "all-linear": ("all-linear", "dots", True),
    "q and v": (["q_proj", "v_proj"], "dots", True),
    "keeping everything": ("all-linear", False, True),
    "layers one by one": ("all-linear", "dots", False),
}
"""Targets, remat, scanned layers."""

CONFIG = LlamaConfig(520, 64, 176, 3, 4, 2, 16, tie_word_embeddings=True)
BATCH, SEQ = 3, 40


def version() -> str:
    return ".".join(jax.__version__.split(".")[:2])


def step_of(name, scheme=None):
    """(jitted step, its arguments as shapes); scheme: of a quantised base."""
    targets, remat, scan = STEPS[name]
    model = Llama(CONFIG, remat=remat, scan_layers=scan)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    layouts = {t.path: "sio" for t in hf_tensors(CONFIG) if t.layer is not None and t.path.endswith("/kernel")}
    if scheme:
        shapes = jax.eval_shape(lambda p: jlora.quantise(p, scheme, layouts=layouts), shapes)
    frozen, lora = jax.eval_shape(
        lambda p: jlora.lorafy(p, 4, targets=targets, layouts=layouts if scan else None), shapes
    )
    sums = jlora.lift(answer_sums(model, chunk=64), strict=True)
    tx = optax.adamw(1e-3)
    step = make_train_step(lambda lora, frozen, batch, key: sums(jlora.combine(frozen, lora), batch), tx)
    labels = BATCH * SEQ
    kinds = {"tokens": (BATCH, SEQ), "mask": (BATCH, SEQ), "positions": labels, "labels": labels, "weights": labels}
    dtype = {"mask": bool, "weights": np.float32}
    batch = {k: jax.ShapeDtypeStruct(np.zeros(s, bool).shape, dtype.get(k, np.int32)) for k, s in kinds.items()}
    batch["example"] = batch["labels"]
    return step, (jax.eval_shape(lambda lora: init_state(lora, tx), lora), frozen, batch)


def equations(jaxpr) -> int:
    """Equations of a jaxpr and of those inside it."""
    return sum(1 + sum(map(equations, jax.extend.core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


def copies(text: str) -> int:
    """Copies and transposes, alone or in a fusion, of arrays as large as the activations of a layer."""
    found = re.findall(r"%?(\S+) = \w+\[([\d,]+)\]\S* (copy|transpose|fusion)\(", text)
    large = lambda shape: math.prod(map(int, shape.split(","))) >= BATCH * SEQ * CONFIG.hidden_size
    return sum(
        large(shape)
        for name, shape, op in found
        if op != "fusion" or re.match(r"copy|transpose|wrapped_(copy|transpose)", name)
    )


def measured(name) -> dict[str, float]:
    step, args = step_of(name)
    traced = step.trace(*args)
    compiled = traced.lower().compile()
    cost = compiled.cost_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "copies": copies(compiled.as_text()),
        "equations": equations(traced.jaxpr.jaxpr),
    }


if __name__ == "__main__":
    held = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    held[version()] = {name: measured(name) for name in STEPS}
    BASELINE.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
