"""One training step and one evaluation step, compiled once a batch shape. Nothing here knows what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.train.loss import Sums

SumsFn = Callable[[Any, Any, Any, jax.Array | None], Sums]
"""f(trained, frozen, batch, key or None) -> `Sums`; key drives dropout."""


class TrainState(NamedTuple):
    """All that training changes: the trained tree, its optimiser state, and the number of steps taken (i32 [])."""

    trained: Any
    opt_state: Any
    step: jax.Array


def init_state(trained: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step. The trained tree is copied: the step donates its state."""
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trained)
    return TrainState(trained, tx.init(trained), jnp.zeros((), jnp.int32))


def advance(sums_fn: SumsFn, tx: optax.GradientTransformation, accumulate: int = 1) -> Callable[..., Any]:
    """f(trained, opt_state, frozen, batch, key, rate=1) -> (trained, opt_state, `Sums`, gradient's norm): one step.

    rate: a factor of the update.
    """

    def grads_of(trained: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[Any, Sums]:
        def total(trained: Any) -> tuple[Any, Sums]:
            sums = sums_fn(trained, frozen, batch, key)
            return sums.loss, sums

        return jax.grad(total, has_aux=True)(trained)

    def step(trained: Any, opt_state: Any, frozen: Any, batch: Any, key: jax.Array, rate: Any = None) -> Any:
        if accumulate == 1:
            grads, sums = grads_of(trained, frozen, batch, key)
        else:

            def add(carry: Any, part: Any) -> tuple[Any, None]:
                batch, key = part
                new = grads_of(trained, frozen, batch, key)
                return jax.tree.map(jnp.add, carry, new), None

            keys = jax.random.split(key, accumulate)
            first = jax.tree.map(lambda x: x[0], batch)
            shapes = jax.eval_shape(grads_of, trained, frozen, first, keys[0])
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zeros, (batch, keys))
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1).astype(g.dtype), grads)
        updates, new_state = tx.update(grads, opt_state, trained)
        if rate is not None:
            updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(good, new, old)
        moved = jax.tree.map(keep, optax.apply_updates(trained, updates), trained)
        return moved, jax.tree.map(keep, new_state, opt_state), sums, norm

    return step


def make_train_step(
    sums_fn: SumsFn, tx: optax.GradientTransformation, *, seed: int = 0, accumulate: int = 1, lies: Any = None
) -> Any:
    """step(state, frozen, batch) -> (state, metrics), jitted, the state donated.

    The loss is the mean over labels. With `accumulate` > 1 the batch has that leading axis; gradients of the *sum*
    are added and divided by all labels at the end, so the step equals one with the big batch.
    metrics: `Sums` of the step's batch and the gradient's norm before clipping. Where either is not finite, weights and
    optimiser state stay as they were.
    lies: a tree of the state's shardings, which the new state keeps; without it XLA lays it out as it likes, and the
    second step compiles again.
    """
    one = advance(sums_fn, tx, accumulate)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, tuple[Sums, jax.Array]]:
        # the key is a function of seed and step, so a resumed run draws what the first one would have
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        trained, opt_state, sums, norm = one(state.trained, state.opt_state, frozen, batch, key)
        return TrainState(trained, opt_state, state.step + 1), (sums, norm)

    return jax.jit(step, donate_argnums=0, out_shardings=None if lies is None else (lies, None))


def make_eval_step(sums_fn: SumsFn) -> Any:
    """step(trained, frozen, batch) -> `Sums`, jitted, without dropout."""
    return jax.jit(lambda trained, frozen, batch: sums_fn(trained, frozen, batch, None))
