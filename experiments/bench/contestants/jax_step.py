"""A jitted AdamW step of any JAX loss, compiled ahead, with what the compiler says of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def shifted(tokens: np.ndarray) -> np.ndarray:
    """Labels: the tokens one place on, the last row's end wrapped."""
    return np.roll(tokens, -1, axis=1)


def compiled(step: Any, state: Any, *rest: Any) -> tuple[Callable[[], float], dict[str, Any]]:
    """(run one step, facts) of step(state, *rest) -> (state, loss, or jlora's metrics), the state donated."""
    began = time.perf_counter()
    lowered = (step if hasattr(step, "lower") else jax.jit(step, donate_argnums=0)).lower(state, *rest)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    facts = {"trace": traced - began, "compile": done - traced, "temporaries": memory.temp_size_in_bytes}
    facts |= {"flops_loops_once": cost.get("flops"), "bytes_loops_once": cost.get("bytes accessed")}
    facts["jax"] = jax.__version__
    held = [state]

    def run() -> float:
        held[0], found = program(held[0], *rest)
        if isinstance(found, tuple):  # jlora's metrics
            return float(found[0].loss / found[0].tokens)
        return float(found)

    return run, facts


def adamw_step(loss: Callable[..., Any], rate: float) -> Any:
    """step((trained, first, second, count), *rest): AdamW in five lines, so that any JAX can run it."""

    def step(state: Any, *rest: Any) -> tuple[Any, Any]:
        trained, first, second, count = state
        value, grads = jax.value_and_grad(loss)(trained, *rest)
        count = count + 1
        first = jax.tree_util.tree_map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree_util.tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
        scale = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        move = lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-8)
        return (jax.tree_util.tree_map(move, trained, first, second), first, second, count), value

    return step


def adamw_state(trained: Any) -> Any:
    zeros = lambda: jax.tree_util.tree_map(jnp.zeros_like, trained)
    return (trained, zeros(), zeros(), jnp.zeros((), jnp.float32))
