"""What is paid once: tracing by `lift`, and the demo's first step from a cold start, without and with compiled
programs at hand."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.bench.config import ROOT


def tracing(layers: int, scan: bool, tries: int = 5) -> float:
    """Seconds, the least of `tries`, that `lift` adds to tracing a Llama of that many layers: the traced lifted
    function less the traced plain one."""
    import jax
    import jax.numpy as jnp

    import jlora
    from jlora.models.llama import Llama, LlamaConfig, hf_tensors

    config = LlamaConfig(1000, 128, 256, layers, 4, 2, 32, tie_word_embeddings=True)
    model = Llama(config, scan_layers=scan)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    layouts = {t.path: "sio" for t in hf_tensors(config) if t.layer is not None and t.path.endswith("/kernel")}
    made = lambda p: jlora.lorafy(p, 8, layouts=layouts if scan else None)
    frozen, lora = jax.eval_shape(made, params)
    seconds = lambda f, *args: least(lambda: jax.make_jaxpr(functools.partial(f))(*args), tries)
    plain = seconds(lambda p, t: model.apply({"params": p}, t), params, tokens)
    lifted = jlora.lift(lambda p, t: model.apply({"params": p}, t))
    return seconds(lambda lora, frozen, t: lifted(jlora.combine(frozen, lora), t), lora, frozen, tokens) - plain


def least(f: Any, tries: int) -> float:
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - began)
    return best


def demo_start(compiled: str, steps: int = 1) -> float:
    """Seconds from `jlora demo` to its first training step's end, compiled programs kept in the folder `compiled`."""
    with tempfile.TemporaryDirectory() as out:
        command = ["-W", "ignore", "-m", "jlora.cli", "demo", "--steps", str(steps), "--held-out", "0", "--output", out]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PLATFORMS": "cpu"}
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *command], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as run:
            assert run.stderr is not None
            for line in run.stderr:
                if "trained in" in line:
                    seconds = time.perf_counter() - began
            if run.wait():
                raise RuntimeError(f"jlora demo ended with {run.returncode}")
    return seconds


def starts() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as compiled:
        cold = demo_start(compiled)
        warm = min(demo_start(compiled) for _ in range(2))
    return {
        "lift, 32 scanned layers": tracing(32, True),
        "lift, 96 unrolled layers": tracing(96, False, 2),
        "demo to its first step": cold,
        "demo to its first step, compiled before": warm,
    }
