"""AdaLoRA: one budget of ranks, spent where it matters (Zhang et al. 2023, arXiv 2303.10512).

W + scaling * P·Λ·Q, Λ diagonal and zero at first; P and Q are held near orthonormal by a term of the loss, R(P, Q) =
||P^T P - I||^2 + ||Q Q^T - I||^2 (`regulariser`). Every so often the triples (column of P, λ, row of Q) of all weights
are ranked together and the λ of those outside a budget, which falls by a cubic schedule, are set to zero
(`update_budget`). A triple's importance is s(λ) + mean s(P) + mean s(Q), s = sensitivity x uncertainty: the running
means of |w dL/dw| and of its distance from that. A zeroed triple may come back, until the last phase.

    frozen, trained = make(params, budget.start, key=key);  state = init_budget(trained)
    grads = jax.grad(lambda t: loss(t) + 0.1 * regulariser(t))(trained);  trained = optax...
    trained, state = update_budget(step, trained, grads, state, budget)          # step 1, 2, ...; jits
    lora = settle(trained)                                                       # plain factors by rank
`budgeted(tx, budget)` is all of this as an optimiser, for loops that know nothing of it.
Departures: w in |w dL/dw| is the weight after the optimiser's step, as in the released code; the scaling is alpha / r
of the first rank throughout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.config import keep_base
from jlora.leaves import LoraLeaf
from jlora.lora import Adapter, LoraFactors, is_adapter, leaf_key, lorafy
from jlora.tree import path_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaLora(Adapter):
    """p [s, i, r], lam [s, r], q [s, r, o] of one weight, axes as in `LoraFactors`."""

    p: Any
    lam: Any
    q: Any
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})
    layout: str = dataclasses.field(default="io", metadata={"static": True})

    def factors(self) -> LoraFactors:
        """The same difference as A = P·Λ, B = Q."""
        stack = self.layout.count("s")
        lam = self.lam.reshape(*self.lam.shape[:stack], *(1,) * (self.p.ndim - stack - 1), -1)
        return LoraFactors(self.p * lam, self.q, self.scaling, self.layout)

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> LoraLeaf:
        return self.factors().attach(w, path, dropout, key)

    def describe(self) -> str:
        return f"AdaLoRA, rank up to {self.lam.shape[-1]}, scaling {self.scaling:g}, axes {self.layout}"


@dataclasses.dataclass(frozen=True)
class Budget:
    """The schedule, in ranks a weight (times the number of weights) and steps.

    `start` for `warmup` steps, then down to `target` as the cube of the time left, `target` in the last `final` of
    `steps`, in which the triples kept stay the same. Triples are ranked every `interval` steps.
    """

    start: int
    target: int
    steps: int
    warmup: int = 0
    final: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if not 1 <= self.target <= self.start:
            raise ValueError(
                f"ranks from {self.start} to {self.target}: the target is at least 1 and at most the start"
            )
        if self.warmup + self.final >= self.steps or min(self.warmup, self.final) < 0 or self.interval < 1:
            raise ValueError(f"{self.steps} steps leave none between warmup {self.warmup} and final {self.final}")

    def at(self, step: Any, weights: int) -> jax.Array:
        """Triples to keep at `step`, of all `weights` together."""
        left = 1 - (step - self.warmup) / (self.steps - self.final - self.warmup)
        cubic = (self.start - self.target) * weights * jnp.clip(left, 0, 1) ** 3 + self.target * weights
        return jnp.floor(cubic + 1e-3).astype(jnp.int32)  # the cube of f32 may fall short of a whole number


def make(params: Any, rank: int | None = None, *, key: Any = None, **options: Any) -> tuple[Any, Any]:
    """(frozen, trained), options as for `jlora.lorafy` but init: P, Q are N(0, 0.02^2), Λ zero. rank: the first one.

    Raises ValueError for an init that changes the base.
    """
    keep_base("AdaLoRA", **options)
    key = jax.random.key(0) if key is None else key
    frozen, lora = lorafy(params, rank, key=key, **options)

    def at(keys: Any, entry: Any) -> Any:
        if not isinstance(entry, LoraFactors):
            return entry
        draw = lambda n, x: (0.02 * jax.random.normal(jax.random.fold_in(own, n), x.shape)).astype(x.dtype)
        own, stack = leaf_key(key, path_of(keys)), entry.lora_a.shape[: entry.layout.count("s")]
        lam = jnp.zeros((*stack, entry.lora_a.shape[-1]), entry.lora_a.dtype)
        return AdaLora(draw(0, entry.lora_a), lam, draw(1, entry.lora_b), entry.scaling, entry.layout)

    return frozen, jax.tree_util.tree_map_with_path(at, lora, is_leaf=lambda x: x is None or is_adapter(x))


def triples(entry: AdaLora) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(P [s, i, r], Λ [s, r], Q [s, r, o]) with all axes of a kind flattened, f32."""
    rank = entry.lam.shape[-1]
    lam = entry.lam.reshape(-1, rank)
    parts = (entry.p.reshape(len(lam), -1, rank), lam, entry.q.reshape(len(lam), rank, -1))
    return parts[0].astype(jnp.float32), parts[1].astype(jnp.float32), parts[2].astype(jnp.float32)


def held(trained: Any) -> list[AdaLora]:
    return [x for x in jax.tree.leaves(trained, is_leaf=is_adapter) if isinstance(x, AdaLora)]


def regulariser(trained: Any) -> jax.Array:
    """The sum of ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2 over all matrices, to be added to the loss times about 0.1.

    (The released code takes the mean of the norms, not the sum of their squares.)
    """
    value = jnp.zeros(())
    for entry in held(trained):
        p, _, q = triples(entry)
        eye = jnp.eye(p.shape[-1])
        value += jnp.sum((jnp.swapaxes(p, 1, 2) @ p - eye) ** 2) + jnp.sum((q @ jnp.swapaxes(q, 1, 2) - eye) ** 2)
    return value


def init_budget(trained: Any) -> dict[str, Any]:
    """The state of `update_budget`: running means of every triple's parts, and which triples are kept."""
    zeros = [tuple(map(jnp.zeros_like, triples(entry))) for entry in held(trained)]
    kept = [jnp.ones(lam.shape, bool) for _, lam, _ in zeros]
    return {"sensitivity": zeros, "uncertainty": jax.tree.map(jnp.zeros_like, zeros), "kept": kept}


def update_budget(step: Any, trained: Any, grads: Any, state: dict[str, Any], budget: Budget) -> tuple[Any, Any]:
    """(trained, state) after ranking the triples: `step` counts from 1, `trained` is after the optimiser's step and
    `grads` are what it was made from. Raises ValueError for a tree without AdaLoRA.
    """
    entries = held(trained)
    if not entries:
        raise ValueError("no weight of this tree is adapted by AdaLoRA")
    weights = [triples(entry) for entry in entries]
    moves = jax.tree.map(lambda w, g: jnp.abs(w * g), weights, [triples(entry) for entry in held(grads)])
    b1, b2 = budget.beta1, budget.beta2
    sensitivity = jax.tree.map(lambda old, new: b1 * old + (1 - b1) * new, state["sensitivity"], moves)
    apart = lambda old, new, mean: b2 * old + (1 - b2) * jnp.abs(new - mean)
    uncertainty = jax.tree.map(apart, state["uncertainty"], moves, sensitivity)

    scores = []
    for s, u in zip(sensitivity, uncertainty, strict=True):
        p, lam, q = (a * b for a, b in zip(s, u, strict=True))
        scores.append(lam + p.mean(1) + q.mean(2))
    flat = jnp.concatenate([score.ravel() for score in scores])
    place = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)  # 0 for the most important
    best = place < budget.at(step, sum(len(lam) for _, lam, _ in weights))
    ends = np.cumsum([score.size for score in scores])
    best = [part.reshape(score.shape) for part, score in zip(jnp.split(best, ends[:-1]), scores, strict=True)]

    settled = step > budget.steps - budget.final
    rank_now = (step > budget.warmup) & (step % budget.interval == 0) & ~jnp.asarray(settled)
    last = jnp.asarray(step == budget.steps - budget.final)
    kept = [jnp.where(rank_now | last, new, old) for new, old in zip(best, state["kept"], strict=True)]
    masked = iter(
        dataclasses.replace(e, lam=jnp.where((rank_now | last | settled) & ~k.reshape(e.lam.shape), 0, e.lam))
        for e, k in zip(entries, kept, strict=True)
    )
    trained = jax.tree.map(lambda x: next(masked) if isinstance(x, AdaLora) else x, trained, is_leaf=is_adapter)
    return trained, {"sensitivity": sensitivity, "uncertainty": uncertainty, "kept": kept}


def budgeted(tx: optax.GradientTransformation, budget: Budget, weight: float = 0.1) -> optax.GradientTransformation:
    """`tx`, with the gradient of `weight` times the `regulariser` added, and the ranks kept to `budget` after a step.

    A λ outside the budget is updated by what brings it to zero.
    """

    def init(params: Any) -> Any:
        return {"tx": tx.init(params), "ranks": init_budget(params), "step": jnp.zeros((), jnp.int32)}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grads = jax.tree.map(lambda g, r: g + weight * r.astype(g.dtype), updates, jax.grad(regulariser)(params))
        updates, inner = tx.update(grads, state["tx"], params)
        moved, step = optax.apply_updates(params, updates), state["step"] + 1
        ranked, kept = update_budget(step, moved, grads, state["ranks"], budget)
        change = lambda u, new, was, old: jnp.where(new == was, u, new - old)
        updates = jax.tree.map(change, updates, ranked, moved, params)
        return updates, {"tx": inner, "ranks": kept, "step": step}

    return optax.GradientTransformation(init, update)


def ranks(trained: Any) -> dict[str, list[int]]:
    """{path: the number of λ that are not zero, a layer}."""
    keyed = jax.tree_util.tree_flatten_with_path(trained, is_leaf=is_adapter)[0]
    count = lambda e: (np.asarray(e.lam).reshape(-1, e.lam.shape[-1]) != 0).sum(1).tolist()
    return {path_of(keys): count(e) for keys, e in keyed if isinstance(e, AdaLora)}


def settle(trained: Any) -> Any:
    """Plain `LoraFactors`, for files and serving: the triples with λ = 0 dropped, a weight without any None.

    A stack of layers has one rank, its largest; the columns that a layer lacks of it are zero.
    """

    def at(entry: Any) -> Any:
        if not isinstance(entry, AdaLora):
            return entry
        lam = np.asarray(entry.lam).reshape(-1, entry.lam.shape[-1])
        most = int((lam != 0).sum(1).max())
        if most == 0:
            return None
        order = np.argsort(lam == 0, axis=1, kind="stable")[:, :most]
        there = np.take_along_axis(lam != 0, order, 1)
        p, kept, q = triples(entry)
        a = jnp.take_along_axis(p * kept[:, None], order[:, None], 2)
        b = jnp.take_along_axis(q, order[..., None], 1) * there[..., None]
        stack, dtype = entry.layout.count("s"), entry.p.dtype
        a = a.reshape(*entry.p.shape[:-1], most).astype(dtype)
        b = b.reshape(*entry.q.shape[:stack], most, *entry.q.shape[stack + 1 :]).astype(dtype)
        return LoraFactors(a, b, entry.scaling, entry.layout)

    return jax.tree.map(at, trained, is_leaf=is_adapter)
