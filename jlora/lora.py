"""LoRA as a transform of parameter trees (Hu et al., arXiv 2106.09685v2, section 4.1).

`lorafy` reads a tree of weights and gives a second tree beside it, with factors where a weight is adapted and None
elsewhere. Only that second tree is trained, so no gradient and no optimiser state of the first can exist.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from jlora.config import LoraConfig
from jlora.inits import CHANGES_BASE, INITS
from jlora.leaves import RANK, ImplicitLeaf, LoraLeaf, is_implicit, unrounded
from jlora.targets import BIAS, check_layouts, letters_of, targeted
from jlora.tree import Targets, first_match, names_in, path_of, paths, select


class Adapter:
    """A node of the trainable tree: what is trained about one weight. `attach` makes the leaf the model meets.

    mergeable: False where what is trained is beside the weights, so that no tree of weights can hold it.
    """

    mergeable: ClassVar[bool] = True

    def attach(self, w: Any, path: str, dropout: float, key: Any) -> ImplicitLeaf:
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for `jlora.summary`."""
        return type(self).__name__


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Together:
    """Trained trees of several methods beside one frozen tree, attached in their order (`methods/together.py`)."""

    trees: tuple[Any, ...]


def is_adapter(value: Any) -> bool:
    return isinstance(value, Adapter)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFactors(Adapter):
    """The two factors of one weight. `layout`: one letter an axis of it, s(tacked), i(nput) or o(utput).

    `lora_a`: the s axes, the i axes, then r. `lora_b`: the s axes, r, the o axes. For a Flax kernel
    (in, out) of layout "io" that is lora_a [in, r], lora_b [r, out]; for a stack "sio" [s, in, r] and [s, r, out].
    """

    lora_a: Any
    lora_b: Any
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})
    layout: str = dataclasses.field(default="io", metadata={"static": True})

    def attach(self, w: Any, path: str, dropout: float = 0.0, key: Any = None) -> LoraLeaf:
        self.check(w, path)
        a_axes, b_axes = factor_axes(self.layout)
        stack = axes_of(self.layout, "s")
        if key is not None and stack:
            key = jax.random.split(key, tuple(w.shape[ax] for ax in stack))
        key_axes = stack if key is not None else ()
        return LoraLeaf(w, self.lora_a, self.lora_b, key, a_axes, b_axes, key_axes, self.scaling, dropout, path)

    def check(self, w: Any, path: str) -> None:
        """Raises ValueError where the factors are not of a weight of this shape."""
        shape, a, b = (getattr(x, "shape", None) for x in (w, self.lora_a, self.lora_b))
        if shape is None or a is None or b is None:  # labels or specs stand in place of arrays
            return
        i, o, stack = (tuple(shape[ax] for ax in axes_of(self.layout, x) if ax < len(shape)) for x in "ios")
        if len(shape) != len(self.layout) or a[:-1] != stack + i or b != (*stack, a[-1], *o):
            raise ValueError(
                f"{path or 'a weight'} {list(shape)}: factors {list(a)} and {list(b)} with axes {self.layout!r} are of "
                "another weight; are the two trees of one model?"
            )

    def describe(self) -> str:
        return f"rank {self.lora_a.shape[-1]}, scaling {self.scaling:g}, axes {self.layout}"


def axes_of(layout: str, letters: str) -> tuple[int, ...]:
    return tuple(n for n, letter in enumerate(layout) if letter in letters)


def factor_axes(layout: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of W along which each axis of (lora_a, lora_b) runs, `RANK` for the rank axis."""
    stack = axes_of(layout, "s")
    return (*stack, *axes_of(layout, "i"), RANK), (*stack, RANK, *axes_of(layout, "o"))


def lorafy(
    params: Any,
    rank: int | None = None,
    *,
    alpha: float | None = None,
    key: Any = None,
    targets: Targets | None = None,
    exclude: Targets = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layouts: Mapping[str, Any] | None = None,
    init: str | None = None,
    rslora: bool | None = None,
    train: Targets = (),
    dtype: Any = jnp.float32,
    config: LoraConfig | None = None,
) -> tuple[Any, Any]:
    """(frozen, lora): the weights, not copied, and the tree of what is trained beside them.

    `lora` has the structure of `params`: `LoraFactors` where a weight is adapted, the array itself where it is
    trained whole (`train`; it is then None in `frozen`), None elsewhere.

    rank, alpha: r and alpha; the product is scaled by alpha/r (alpha = r if not given), alpha/sqrt(r) with `rslora`.
    key: PRNG key of lora_a; each leaf draws from its own, derived from its path. jax.random.key(0) if not given.
    targets, exclude: "all-linear" (the default: every matrix but embeddings and the head), "attention", "mlp", a
        name ("q_proj"), a regex over the slash-joined path, a list of these, or a predicate of (path, leaf).
    rank_pattern, alpha_pattern: rank and alpha by name or regex, the first that matches.
    layouts: {path, name or regex: letters, one an axis: s stacked or expert, i input, o output}, or what
        `jlora.layouts(apply, params, *example)` returns. Needed for weights of three axes and more.
    init: "kaiming" (default), "gaussian", "pissa" or "olora"; the last two replace the adapted weights in `frozen`.
    train: leaves to train whole (a bias, a new head).
    config: a `LoraConfig` in place of all of these but key, layouts and dtype. Its lora_dropout is `combine`'s to do.

    Raises ValueError if nothing matches a target or pattern, if a weight's axes cannot be told, or for a rank below 1.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype {dtype}: factors are floats")
    key = jax.random.key(0) if key is None else typed(key)
    check_layouts(layouts)
    given = config or LoraConfig()
    if rank is not None:
        given = dataclasses.replace(given, r=rank)
    if config is None:
        alpha = given.r if alpha is None else alpha
    changes = {
        "lora_alpha": alpha,
        "target_modules": targets,
        "exclude_modules": exclude or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "init_lora_weights": init,
        "use_rslora": rslora,
        "modules_to_save": train or None,
    }
    given = dataclasses.replace(given, **{name: value for name, value in changes.items() if value is not None})
    leaves = paths(params, is_implicit)
    for name in ("rank_pattern", "alpha_pattern"):
        select(getattr(given, name), leaves, name)  # a misspelt one is told, as a target's is
    whole = fully_trained(given, leaves, "train" if changes["modules_to_save"] else "modules_to_save")
    only_plain(leaves, whole)
    chosen = [path for path in targeted(given, leaves, layouts) if path not in whole]
    made: dict[str, tuple[Any, LoraFactors]] = {}
    for path in chosen:
        layout = letters_of(path, leaves[path], layouts)
        made[path] = make(leaves[path], path, layout, given, leaf_key(key, path), dtype)

    def frozen_at(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        return None if path in whole else made[path][0] if path in made else leaf

    def lora_at(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        return leaf if path in whole else made[path][1] if path in made else None

    walk = jax.tree_util.tree_map_with_path
    return walk(frozen_at, params, is_leaf=is_implicit), walk(lora_at, params, is_leaf=is_implicit)


def only_plain(leaves: Mapping[str, Any], chosen: Iterable[str]) -> None:
    """Raises ValueError if one of the leaves to train whole is no array."""
    for path in chosen:
        if is_implicit(leaves[path]):
            raise ValueError(f"{path} is a {type(leaves[path]).__name__}, and only a plain weight trains whole")


def fully_trained(config: LoraConfig, leaves: Mapping[str, Any], what: str) -> set[str]:
    """The paths of what trains whole. what: the argument that names them, for the error."""
    train: Targets = config.modules_to_save
    whole = set(select(train, leaves, what) if train else ())
    if config.bias == "all":
        whole |= {path for path in leaves if names_in(path)[-1] in BIAS}
    elif config.bias != "none":
        raise ValueError(f"bias={config.bias!r} is not known: use 'none' or 'all', or name biases in modules_to_save")
    return whole


def typed(key: Any) -> Any:
    """A PRNG key as `jax.random.key` gives it; the numbers [2] of `jax.random.PRNGKey` have an axis more.

    Raises ValueError for what is no key.
    """
    if not hasattr(key, "dtype"):
        raise ValueError(f"key {key!r:.40}: a PRNG key is expected, as jax.random.key(0)")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return cast(Any, jax.random.wrap_key_data(key))


def leaf_key(key: Any, path: str) -> Any:
    """The key of one leaf: it depends on the path alone, so adding a target changes no other leaf."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def make(w: Any, path: str, layout: str, config: LoraConfig, key: Any, dtype: Any) -> tuple[Any, LoraFactors]:
    """(the frozen weight, its factors) for one weight."""
    rank = first_match(config.rank_pattern, path, config.r)
    alpha = first_match(config.alpha_pattern, path, config.lora_alpha)
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    name = config.init_name()
    i_axes, o_axes, s_axes = (axes_of(layout, letter) for letter in "ios")
    s_shape, i_shape, o_shape = (tuple(w.shape[ax] for ax in axes) for axes in (s_axes, i_axes, o_axes))
    n, rows, columns = math.prod(s_shape), math.prod(i_shape), math.prod(o_shape)
    keys = jax.random.split(key, n)
    dense = None

    def draw(key: Any, matrix: Any) -> Any:
        return INITS[name](key, matrix, rank, scaling)

    if name in CHANGES_BASE and is_implicit(w):
        raise ValueError(
            f"init {name!r} changes the base, and {path} is a {type(w).__name__}: adapt the plain weights first, then "
            "quantise what is frozen (frozen = jlora.quantise(frozen, ...)); or use init 'kaiming'"
        )
    if name in CHANGES_BASE:
        if scaling <= 0:
            raise ValueError(
                f"alpha is {alpha:g} for {path}: init {name!r} divides by alpha / rank, which must be above 0"
            )
        if rank > min(rows, columns):
            raise ValueError(
                f"rank {rank} for {path} {list(w.shape)}: init {name!r} needs at most {min(rows, columns)}"
            )
        dense = jnp.asarray(w)
        matrices = jnp.transpose(dense, s_axes + i_axes + o_axes).reshape(n, rows, columns)
        drawn = jax.vmap(draw)(keys, matrices)
    else:
        matrix = jax.ShapeDtypeStruct((rows, columns), w.dtype)  # only the shape is read
        drawn = jax.vmap(functools.partial(draw, matrix=matrix))(keys)
    a, b = drawn
    factors = LoraFactors(
        a.reshape(*s_shape, *i_shape, rank).astype(dtype),
        b.reshape(*s_shape, rank, *o_shape).astype(dtype),
        scaling,
        layout,
    )
    if dense is None:
        return w, factors
    base = unrounded(dense) - factors.attach(dense, path).delta()
    return base.astype(w.dtype), factors


def on_plain_base(lora: Any, start: Any) -> Any:
    """`lora`, begun as `start` by an init that changes the base ("pissa", "olora"), for the base as it was.

    A·B - A0·B0 is [A, A0]·[B; -B0], of twice the rank. A base in less than float32 was rounded when it was changed,
    and the result is as far from what was trained as that.
    """

    def at(now: Any, then: Any) -> Any:
        if not isinstance(now, LoraFactors):
            return now
        a = jnp.concatenate([now.lora_a, then.lora_a], -1)
        b = jnp.concatenate([now.lora_b, -then.lora_b], now.layout.count("s"))
        return dataclasses.replace(now, lora_a=a, lora_b=b)

    return jax.tree.map(at, lora, start, is_leaf=lambda x: isinstance(x, LoraFactors))
