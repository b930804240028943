"""The loop: draw a batch, step, log, save; and evaluation as exact sums."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
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


Stop = Callable[[], bool]
"""Whether SIGTERM has come."""


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Whether SIGTERM has come since (in the main thread; elsewhere it is not noticed)."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event.is_set
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
    after: Callable[[TrainState, Stop], bool] = lambda state, stop: False,
    bad_steps: int = 0,
    keep_bad: Callable[[Any], str] = lambda batch: "",
    stop: Stop | None = None,
    figures: Callable[[Any, Any], dict[str, Any]] | None = None,
) -> TrainState:
    """Train until `steps` steps are taken. `batches`: a grain iterator. The given state is donated.

    `log` gets {step, loss, token_accuracy, exact, first, tokens, examples, grad_norm, read (tokens that are no
    padding), places (with it), seconds} each step; `after(state, stop)` may evaluate: True ends the run early, and it
    may raise `Interrupted` once `stop()`. A step whose loss or gradient is not finite changes no weight; `bad_steps` of
    them in a row are skipped, at the next `keep_bad(batch)` writes the batch down (and says where) and
    FloatingPointError is raised. Where SIGTERM came (`stop`: what tells; a handler of its own if not given) the state
    is saved and `Interrupted` raised; it is also saved after the last step.
    figures: (the step's sums, norm) -> the figures above, for a step that gives other ones.
    """
    with on_sigterm() if stop is None else nullcontext(stop) as told_to_stop:
        number, bad, done = int(state.step), 0, False
        while number < steps and not done:
            began = time.monotonic()
            batch = next(batches)
            state, (sums, norm) = step(state, frozen, batch)
            number += 1
            record = {"step": number, **(figures or plain)(*jax.device_get((sums, norm)))}
            log({**record, **filled(batch), "seconds": time.monotonic() - began})
            if np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"]):
                bad = 0
            elif (bad := bad + 1) > bad_steps:
                raise FloatingPointError(
                    f"loss {record['loss']}, gradient norm {record['grad_norm']} at step {number}, {bad} in a row: "
                    f"try a lower learning rate. {keep_bad(batch)}".rstrip()
                )
            # before `after`, which may be long: a run that is killed in it has this step behind it
            saved = bool(checkpoints and save_every and number % save_every == 0)
            if checkpoints and saved:
                checkpoints.save(state, batches.get_state())
            try:
                done = after(state, told_to_stop)
            except Interrupted:
                done = True
            told = told_to_stop()
            if checkpoints and not saved and (done or told or number == steps):
                checkpoints.save(state, batches.get_state())
            if told:
                if checkpoints:
                    checkpoints.close()
                raise Interrupted
    return state


def plain(sums: Any, norm: Any) -> dict[str, Any]:
    """A step's figures."""
    return {**means(sums), "grad_norm": float(norm)}


def filled(batch: Any) -> dict[str, int]:
    """{read, places}: how many of a batch's places hold a token that is read."""
    mask = batch.get("mask") if isinstance(batch, dict) else None
    return {} if mask is None else {"read": int(mask.sum()), "places": int(mask.size)}


def evaluate(
    step: Callable[..., Sums], trained: Any, frozen: Any, batches: Iterable[Any], stop: Stop = lambda: False
) -> dict[str, float]:
    """`means` over all of `batches`; the sums are added as Python floats, in order, so a rerun gives the same bits.

    Raises `Interrupted` as soon as `stop()`.
    """
    total = np.zeros(len(Sums._fields))
    for batch in batches:
        if stop():
            raise Interrupted
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
