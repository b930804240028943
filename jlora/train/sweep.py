"""Several adapters trained in one program over one frozen base, which is in memory once.

Their factors are stacked on a leading axis (smaller ranks padded with zeros, which stay zeros: a column of A whose row
of B is zero has no gradient, nor has that row) and the step is mapped over it, so ranks, alphas, learning rates, seeds
and data may differ. It equals separate runs to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.data.batches import Batch, BatchSource
from jlora.lora import LoraFactors, is_adapter
from jlora.train.loss import Sums
from jlora.train.step import SumsFn, TrainState, advance


@dataclasses.dataclass(frozen=True)
class Stack:
    """n trained trees as one: `trained` has a leading axis n; `scalings` f32 [n, adapters] and `ranks` are each one's,
    adapter by adapter in tree order."""

    trained: Any
    scalings: jax.Array
    ranks: tuple[tuple[int, ...], ...]

    def __getitem__(self, n: int) -> Any:
        """The n-th tree as it was given, or as `trained` has become."""
        return self.unstack(self.trained, n)

    def unstack(self, trained: Any, n: int) -> Any:
        """The n-th of a stacked tree, its padding taken off."""
        ranks, scalings = iter(self.ranks[n]), iter(np.asarray(self.scalings[n]).tolist())

        def one(entry: Any) -> Any:
            if not is_adapter(entry):
                return entry[n]
            rank, b_axis = next(ranks), rank_axis(entry)
            a = jax.lax.slice_in_dim(entry.lora_a[n], 0, rank, axis=-1)
            b = jax.lax.slice_in_dim(entry.lora_b[n], 0, rank, axis=b_axis)
            return dataclasses.replace(entry, lora_a=a, lora_b=b, scaling=next(scalings))

        return jax.tree.map(one, trained, is_leaf=is_adapter)


def rank_axis(entry: LoraFactors) -> int:
    """The rank's axis in lora_b: after the stacked ones."""
    return entry.layout.count("s")


def stack(trees: Sequence[Any]) -> Stack:
    """Trees of `lorafy` on the same weights as one. Raises ValueError where they adapt different weights, or by
    something else than LoRA."""
    entries = [jax.tree.leaves(tree, is_leaf=is_adapter) for tree in trees]
    shapes = {jax.tree.structure(tree, is_leaf=is_adapter) for tree in trees}
    if len(shapes) > 1:
        raise ValueError("a sweep's adapters must be of the same weights: give one set of targets")
    if any(is_adapter(e) and not isinstance(e, LoraFactors) for some in entries for e in some):
        raise ValueError("a sweep is of LoRA adapters (and weights trained whole)")
    adapters = [[e for e in some if is_adapter(e)] for some in entries]

    def join(*same: Any) -> Any:
        if not is_adapter(same[0]):
            return jnp.stack(same)
        most = max(e.lora_a.shape[-1] for e in same)
        pad = lambda x, axis: jnp.pad(x, [(0, most - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])
        a = jnp.stack([pad(e.lora_a, e.lora_a.ndim - 1) for e in same])
        b = jnp.stack([pad(e.lora_b, rank_axis(e)) for e in same])
        return dataclasses.replace(same[0], lora_a=a, lora_b=b, scaling=1.0)

    trained = jax.tree.map(join, *trees, is_leaf=is_adapter)
    scalings = jnp.asarray([[e.scaling for e in some] for some in adapters], jnp.float32)
    return Stack(trained, scalings, tuple(tuple(e.lora_a.shape[-1] for e in some) for some in adapters))


def scaled(trained: Any, scalings: jax.Array) -> Any:
    """One tree of the stack (under the map) with its scalings taken into lora_b: f32 [adapters]."""
    entries, treedef = jax.tree.flatten(trained, is_leaf=is_adapter)
    out, n = [], 0
    for entry in entries:
        if is_adapter(entry):
            entry = dataclasses.replace(entry, lora_b=entry.lora_b * scalings[n])  # noqa: PLW2901
            n += 1
        out.append(entry)
    return jax.tree.unflatten(treedef, out)


def init_sweep(stacked: Stack, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    trained = jax.tree.map(lambda x: jnp.array(x, copy=True), stacked.trained)
    return TrainState(trained, jax.vmap(tx.init)(trained), jnp.zeros((), jnp.int32))


def make_sweep_step(
    sums_fn: SumsFn,
    tx: optax.GradientTransformation,
    stacked: Stack,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    accumulate: int = 1,
    at_once: int = 0,
) -> Any:
    """step(state, frozen, batch of `SweepSource`) -> (state, (sums [n], norms [n])), jitted, the state donated.

    tx: of a learning rate of 1, its update proportional to it and its rule one element's (adamw, lion, sgd); `rates`
    multiply its updates. at_once: how many adapters are computed together (0: all); fewer need less memory for
    activations.
    """
    count = len(rates)
    peaks, keys = jnp.asarray(rates, jnp.float32), jax.vmap(jax.random.key)(jnp.asarray(seeds))

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, tuple[Sums, jax.Array]]:
        def one(args: Any) -> Any:
            trained, opt_state, batch, scalings, rate, key = args
            own = lambda trained, *rest: sums_fn(scaled(trained, scalings), *rest)
            now = jax.random.fold_in(key, state.step)
            return advance(own, tx, accumulate)(trained, opt_state, frozen, batch, now, rate)

        parts = (state.trained, state.opt_state, batch, stacked.scalings, peaks, keys)
        if at_once in (0, count):
            trained, opt_state, sums, norms = jax.vmap(one)(parts)
        else:
            trained, opt_state, sums, norms = jax.lax.map(one, parts, batch_size=at_once if at_once > 1 else None)
        return TrainState(trained, opt_state, state.step + 1), (sums, norms)

    return jax.jit(step, donate_argnums=0)


class SweepSource:
    """Batches of several sources, stacked: [n, ...] each, padded to the longest of the step. By step, as they are."""

    def __init__(self, sources: Sequence[BatchSource]):
        self.sources = sources
        self.labels = max(max(source.labels) for source in sources)

    def __len__(self) -> int:
        return min(len(source) for source in self.sources)

    def __getitem__(self, step: int) -> Batch:
        parts = [source[step] for source in self.sources]
        length = max(part["tokens"].shape[-1] for part in parts)
        wide = [widen(part, length, self.labels) for part in parts]
        return {name: np.stack([part[name] for part in wide]) for name in wide[0]}

    iterator = BatchSource.iterator


def widen(batch: Batch, length: int, labels: int) -> Batch:
    """A batch of `collate` with sequences of `length` and slots for `labels`: the same examples."""
    old = batch["tokens"].shape[-1]
    out = {}
    for name, x in batch.items():
        sequence = name in ("tokens", "mask", "segments", "places", "types")
        slots = name in ("positions", "labels", "weights", "example") and "positions" in batch
        if name == "positions":
            x = x // old * length + x % old  # noqa: PLW2901
        more = length - old if sequence else labels - x.shape[-1] if slots else 0
        fill = batch["tokens"].shape[-2] if name == "example" else 0
        out[name] = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)], constant_values=fill)
    return out
