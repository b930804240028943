"""EVA: A starts as the directions in which the data vary most at a weight's input (Paischer et al. 2024, 2410.07170).

Of the activations x [n, i] that a weight multiplies over a few batches, C = (x - mean)^T (x - mean) = V S^2 V^T; A is
V's first r columns, B zero. Ranks follow the data: of all weights' explained variances S_j^2 / trace C the largest N r
are kept (N weights), at most rho r a weight.

The activations are read off the unmodified function. A `Tap` leaves its weight's product as it is and has a derivative
of its own: the gradient of the zeros it carries is what it saw. So sums over uses, layers of a scan and batches are
the gradient's. Where r is far below i it sees C·Omega for a random Omega [i, k], and C is rebuilt from that (Nyström;
Tropp et al. 2017, 1706.05736): exact for a C of rank k, and [i, k] numbers a weight instead of [i, i].
Departures: the covariance of all batches at once, where the paper updates an SVD batch by batch; a stack of layers has
one rank, its largest, layers of a smaller one having columns of A that are zero, and stay so; the scaling is alpha / r
for r as given, whatever rank a weight ends with; an input that never varies has one direction, itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import keep_base
from jlora.following import FollowingLeaf, Product
from jlora.leaves import RANK, Labels, as_array, contract, is_implicit
from jlora.lift import is_array, lift
from jlora.lora import LoraFactors, axes_of, is_adapter, leaf_key, lorafy
from jlora.methods.plant import entries_of, leaves_of, replaced
from jlora.tree import path_of

OVERSAMPLED = 4
"""Columns of Omega for each of rho r directions: the error of the smallest one kept is that of the rest of C, split."""
NOISE = 32 * float(jnp.finfo(jnp.float32).eps)
"""What rounding leaves of a variance that is none, as a part of the mean square."""
TINY = 1e-30


def identity(y: jax.Array, zeros: Any, seen: Any) -> jax.Array:
    return y


tap = jax.custom_vjp(identity)
"""y of (y, zeros, seen); the gradient with regard to `zeros` is `seen`."""
tap.defvjp(lambda y, zeros, seen: (y, seen), lambda seen, dy: (dy, seen, jax.tree.map(jnp.zeros_like, seen)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap(FollowingLeaf):
    """A weight that sees what it multiplies.

    `beside`: omega [i, k]; zeros gram [s, i, k], sum and square [s, i], count [s].
    mask: bool, the leading axes of the activations (or all of them, flattened): which columns are seen; or None.
    """

    mask: Any = None

    def after(self, y: Any, x: Any, product: Product) -> Any:
        omega = self.labels("omega")
        if set(omega) - {RANK} != set(product.summed) or not set(product.summed) <= set(product.x):
            return y  # another use of it: a tied head, a transpose, a convolution
        x = x.astype(jnp.float32)
        free = tuple(ax for ax in product.x if ax not in omega)
        real = jnp.ones([x.shape[product.x.index(ax)] for ax in free], jnp.float32)
        if self.mask is not None:
            counted = columns(self.mask, real.shape)
            if counted is None:
                return y  # no rows of the batch: DeBERTa's relative positions
            real = real * counted
            x = x * contract(real, free, jnp.ones(()), (), product.x)
        h = contract(x, product.x, self.beside["omega"], omega, (*free, RANK), precision="highest")
        seen = {
            "gram": contract(x, product.x, h, (*free, RANK), self.labels("gram"), precision="highest"),
            "sum": total(x, product.x, self.labels("sum")),
            "square": total(x * x, product.x, self.labels("square")),
            "count": total(real, free, self.labels("count")),
        }
        return tap(y, {name: self.beside[name] for name in seen}, seen)

    def materialise(self) -> jax.Array:
        return as_array(self.w)


def columns(mask: Any, shape: tuple[int, ...]) -> Any:
    """The mask over activations of these leading axes, or None where it does not fit them."""
    if shape[: mask.ndim] == mask.shape:
        return mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
    if shape and shape[0] == mask.size:
        return mask.reshape(-1, *(1,) * (len(shape) - 1))
    return None


def total(array: jax.Array, axes: Labels, kept: Labels) -> jax.Array:
    """The sum over the axes that are not `kept`, in `kept`'s order."""
    return contract(array, axes, jnp.ones(()), (), kept)


def make(
    params: Any,
    rank: int,
    apply: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    mask: Callable[[Any], Any] | None = None,
    centre: bool = True,
    sketch: int | None = None,
    key: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """(frozen, lora): as `jlora.lorafy(params, rank, **options)`, A and ranks from what `apply(params, batch)` does.

    rho: the largest rank is rho * rank; 1 keeps all ranks alike. mask: of a batch, True for the columns that count (not
    padding). centre: False for directions of x^T x itself. sketch: columns of Omega; all there are, or 4 rho rank.
    Raises ValueError for rho below 1, no batch, a weight that multiplied nothing, or an init that changes the base.
    """
    keep_base("EVA", **options)
    if rho < 1:
        raise ValueError(f"rho {rho}: the largest rank is rho * rank, so 1 or more")
    key = jax.random.key(0) if key is None else key
    frozen, lora = lorafy(params, rank, key=key, **options)
    most = math.ceil(rho * rank)
    sees = {path: e for path, e in entries_of(lora).items() if isinstance(e, LoraFactors)}
    taps = {path: zeros_of(e, sketch or OVERSAMPLED * most, leaf_key(key, path)) for path, e in sees.items()}
    arrays = {path: w for path, w in leaves_of(frozen).items() if is_implicit(w) or is_array(w)}

    @jax.jit
    def look(arrays: Any, lora: Any, taps: Any, batch: Any, mask: Any) -> Any:
        return watch(apply, replaced(frozen, arrays), lora, taps, batch, mask)

    found: Any = None
    for batch in batches:
        seen = look(arrays, lora, taps, batch, None if mask is None else jnp.asarray(mask(batch)))
        found = seen if found is None else jax.tree.map(jnp.add, found, seen)
    if found is None:
        raise ValueError("EVA needs at least one batch to see")
    kept: dict[str, Any] = {}
    for path, entry in sees.items():
        if not np.asarray(found[path]["count"]).all():
            raise ValueError(
                f"{path} multiplied no activation of these batches, or none that `mask` fits: leave it out"
            )
        kept[path] = directions(found[path], taps[path]["omega"], entry, most, centre)
    ranks = distribute({path: np.asarray(ratios) for path, (_, ratios) in kept.items()}, rank)

    def at(keys: Any, entry: Any) -> Any:
        path = path_of(keys)
        return started(entry, kept[path][0], ranks[path]) if path in kept else entry

    return frozen, jax.tree_util.tree_map_with_path(at, lora, is_leaf=lambda x: x is None or is_adapter(x))


def zeros_of(entry: LoraFactors, width: int, key: Any) -> dict[str, jax.Array]:
    """The arrays of a `Tap` for this weight; Omega has orthonormal columns, or is the identity."""
    count = entry.layout.count("s")
    stack, inputs = entry.lora_a.shape[:count], entry.lora_a.shape[count:-1]
    size = math.prod(inputs)
    omega = jnp.eye(size) if width >= size else jnp.linalg.qr(jax.random.normal(key, (size, width)))[0]
    return {
        "omega": omega.reshape(*inputs, -1),
        "gram": jnp.zeros((*stack, *inputs, omega.shape[1])),
        "sum": jnp.zeros((*stack, *inputs)),
        "square": jnp.zeros((*stack, *inputs)),
        "count": jnp.zeros(stack),
    }


def watch(apply: Any, frozen: Any, lora: Any, taps: Any, batch: Any, mask: Any) -> Any:
    """{path: what its weight saw} of one batch: the gradient of the zeros."""
    weights = leaves_of(frozen)

    def outputs(zeros: Any) -> jax.Array:
        def at(keys: Any, entry: Any, w: Any) -> Any:
            path = path_of(keys)
            if path not in taps:
                return w if entry is None or is_adapter(entry) else entry
            stack, inputs = (axes_of(entry.layout, letter) for letter in "si")
            whole = (*stack, *inputs)
            axes = {"omega": (*inputs, RANK), "gram": (*whole, RANK), "sum": whole, "square": whole, "count": stack}
            return Tap(weights[path], taps[path] | zeros[path], tuple(axes.items()), path, mask)

        is_leaf = lambda x: x is None or is_adapter(x)
        out = lift(apply)(jax.tree_util.tree_map_with_path(at, lora, frozen, is_leaf=is_leaf), batch)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.zeros(()))

    return jax.grad(outputs)({path: {k: x for k, x in held.items() if k != "omega"} for path, held in taps.items()})


def directions(
    seen: dict[str, jax.Array], omega: jax.Array, entry: LoraFactors, most: int, centre: bool
) -> tuple[jax.Array, jax.Array]:
    """(V [s, i, m], explained variance [s, m]) of each layer, m = `most` or as many as there are; axes flattened."""
    width = omega.shape[-1]
    flat = omega.reshape(-1, width)
    size = flat.shape[0]
    rows = {name: seen[name].reshape(-1, size) for name in ("sum", "square")}

    def one(gram: jax.Array, sums: jax.Array, squares: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, trace = sums / count, jnp.sum(squares)
        spread = trace - count * jnp.sum(mean * mean)
        if centre:
            varies = spread > NOISE * trace
            trace = jnp.where(varies, spread, trace)
            gram = gram - jnp.where(varies, count, 0) * mean[:, None] * (mean @ flat)
        if width == size:
            values, vectors = jnp.linalg.eigh((gram + gram.T) / 2)
            values, vectors = values[::-1], vectors[:, ::-1]
        else:
            values, vectors = nystrom(gram, flat)
        explained = jnp.maximum(values[:most], 0) / jnp.maximum(trace, TINY)
        return vectors[:, :most], jnp.where(trace > TINY, explained, 0)

    return jax.lax.map(
        lambda args: one(*args),
        (seen["gram"].reshape(-1, size, width), rows["sum"], rows["square"], seen["count"].reshape(-1)),
    )


def nystrom(y: jax.Array, omega: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values [k], vectors [i, k]) of the C >= 0 [i, i] with C·omega = y: y (omega^T y)^-1 y^T."""
    # of a C without full rank, or of nothing
    shift = jnp.maximum(jnp.finfo(y.dtype).eps * jnp.linalg.norm(y) * len(y) ** 0.5, TINY)
    y = y + shift * omega
    core = omega.T @ y
    root = jnp.linalg.cholesky((core + core.T) / 2)
    u, s, _ = jnp.linalg.svd(jax.scipy.linalg.solve_triangular(root, y.T, lower=True).T, full_matrices=False)
    return s * s - shift, u


def distribute(ratios: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """{path: ranks int [s]}: how many of each layer's directions are among the N * rank that explain most. Where some
    explain alike, nothing say, the first of every layer go before its second."""
    flat = np.concatenate([r.ravel() for r in ratios.values()])
    order = np.concatenate([np.arange(r.size) % r.shape[1] for r in ratios.values()])
    kept = np.zeros(flat.size, bool)
    kept[np.lexsort((order, -flat))[: rank * sum(len(r) for r in ratios.values())]] = True
    ends = np.cumsum([r.size for r in ratios.values()])[:-1]
    return {path: k.reshape(r.shape).sum(1) for (path, r), k in zip(ratios.items(), np.split(kept, ends), strict=True)}


def started(entry: LoraFactors, vectors: jax.Array, ranks: np.ndarray) -> LoraFactors | None:
    """`entry` with its A these directions, as many a layer as `ranks`; None where it has none."""
    most = int(ranks.max())
    if most == 0:
        return None
    count, dtype = entry.layout.count("s"), entry.lora_a.dtype
    held = jnp.arange(most) < jnp.asarray(ranks)[:, None, None]
    a = jnp.where(held, vectors[:, :, :most], 0).reshape(*entry.lora_a.shape[:-1], most)
    shape = entry.lora_b.shape
    b = jnp.zeros((*shape[:count], most, *shape[count + 1 :]), dtype)
    return LoraFactors(a.astype(dtype), b, entry.scaling, entry.layout)
