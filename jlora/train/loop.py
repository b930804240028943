"""The loop: draw a batch, step, log, save; and evaluation as exact sums."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jlora.train.checkpoint import Checkpoints
from jlora.train.loss import Sums
from jlora.train.step import TrainState


class Interrupted(SystemExit):
    """SIGTERM arrived; the state was saved. The process ends with status 143."""

    def __init__(self) -> None:
        super().__init__(143)


@contextmanager
def on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets (in the main thread; elsewhere nothing sets it)."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def fit(
    step: Callable[..., Any],
    state: TrainState,
    frozen: Any,
    batches: Any,
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    after: Callable[[TrainState], bool] = lambda state: False,
    bad_steps: int = 0,
    keep_bad: Callable[[Any], str] = lambda batch: "",
) -> TrainState:
    """Train until `steps` steps are taken. `batches`: a grain iterator. The given state is donated.

    `log` gets {step, loss, tokens, right, exact, grad_norm} each step; `after(state)` may evaluate, True stops early.
    A step whose loss or gradient is not finite changes no weight; `bad_steps` of them in a row are skipped, at the next
    `keep_bad(batch)` writes the batch down (and says where) and FloatingPointError is raised.
    Raises `Interrupted` after saving where SIGTERM came.
    """
    with on_sigterm() as stop:
        number, bad = int(state.step), 0
        while number < steps:
            batch = next(batches)
            state, (sums, norm) = step(state, frozen, batch)
            number += 1
            record = {"step": number, **means(jax.device_get(sums)), "grad_norm": float(norm)}
            log(record)
            if np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"]):
                bad = 0
            elif (bad := bad + 1) > bad_steps:
                raise FloatingPointError(
                    f"loss {record['loss']}, gradient norm {record['grad_norm']} at step {number}, {bad} in a row: "
                    f"try a lower learning rate. {keep_bad(batch)}".rstrip()
                )
            done = after(state)
            if checkpoints and (stop.is_set() or (save_every and number % save_every == 0)):
                checkpoints.save(state, batches.get_state())
            if stop.is_set():
                if checkpoints:
                    checkpoints.close()
                raise Interrupted
            if done:
                break
    return state


def evaluate(step: Callable[..., Sums], trained: Any, frozen: Any, batches: Iterable[Any]) -> dict[str, float]:
    """`means` over all of `batches`; the sums are added as Python floats, in order, so a rerun gives the same bits."""
    total = np.zeros(len(Sums._fields))
    for batch in batches:
        total += np.asarray([float(x) for x in jax.device_get(step(trained, frozen, batch))])
    return means(Sums(*map(float, total)))


def means(sums: Any) -> dict[str, float]:
    """Ratios of `Sums`: loss in nats a label, token accuracy, share of exact answers and of right first labels."""
    tokens, examples = max(float(sums.tokens), 1.0), max(float(sums.examples), 1.0)
    return {
        "loss": float(sums.loss) / tokens,
        "token_accuracy": float(sums.right) / tokens,
        "exact": float(sums.exact) / examples,
        "first": float(sums.first) / examples,
        "tokens": float(sums.tokens),
        "examples": float(sums.examples),
    }
