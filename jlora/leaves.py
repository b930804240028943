"""What a weight can be: an array, or an object that knows how it is used.

An `ImplicitLeaf` stands where a weight stood. It has the weight's shape and dtype, and for each JAX primitive it
understands it gives a method that computes the primitive's result without building the weight. `lift` calls those
methods; whatever a leaf does not understand, `lift` asks it to `materialise`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jlora.placing import lying

RANK = -1
"""The label of an axis of the array's own: the rank axis of LoRA's factors."""
Labels = tuple[int, ...]
"""What each axis of an array runs along: n >= 0 for axis n of the weight, or `RANK`."""


class ImplicitLeaf:
    """A weight given by what it does. Subclasses are pytrees and fill `rules`.

    `rules[name](eqn, bind, position, *operands)` computes the primitive `name` when this leaf is operand number
    `position`; it returns one value, a list of values for a primitive with several results, or `NotImplemented` to
    have the weight materialised. `bind(*operands)` runs the equation itself on other operands (they may be implicit).
    `trainable` names the fields that train.
    """

    rules: ClassVar[dict[str, Callable[..., Any]]] = {}
    trainable: ClassVar[tuple[str, ...]] = ()
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __jax_array__(self) -> Any:
        raise TypeError(f"{self.path or 'a weight'} is a {type(self).__name__}, no array: call jlora.lift(f), not f")

    def materialise(self) -> jax.Array:
        """The weight as one array [*shape], rounded to its dtype once."""
        raise NotImplementedError

    def unrounded(self) -> jax.Array:
        """The weight [*shape] for a sum that is rounded after it, where that is more than `materialise` gives."""
        return self.materialise()

    def unstack(self) -> tuple[Any, Callable[[Any], Any]] | None:
        """(stacked, rebuild), `rebuild` making the leaf W[i] from the i-th rows of the pytree `stacked`, or None."""
        return None

    def has_its_axes(self) -> bool:
        """Whether the arrays have the axes that the static fields name: not after `vmap`, `scan` or an index outside
        `lift` took one away."""
        return True

    def shard_specs(self, spec: Any, exact: bool = True) -> Any:
        """This leaf with a PartitionSpec for each of its arrays, `spec` being the whole weight's; None: cannot.

        exact: a device's part of the arrays must be the leaf of its part of the weight, as `shard_map` needs; `jit`
        does not care.
        """
        return None


def is_implicit(value: Any) -> bool:
    return isinstance(value, ImplicitLeaf)


def as_array(w: Any) -> jax.Array:
    """A weight, whatever it is, as one array [*shape]."""
    return w.materialise() if is_implicit(w) else jnp.asarray(w)


def unrounded(w: Any) -> jax.Array:
    """A weight [*shape] in float32 or better, to be computed with further."""
    w = w.unrounded() if is_implicit(w) else jnp.asarray(w)
    return w if jnp.finfo(w.dtype).bits >= 32 else w.astype(jnp.float32)


def unstacked(w: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """`ImplicitLeaf.unstack` of a stack of weights [s, ...]; an array is its own rows."""
    return w.unstack() if is_implicit(w) else (w, lambda row: row)


def specs_of(w: Any, spec: Any, exact: bool = True) -> Any:
    """`ImplicitLeaf.shard_specs` of a weight; an array's is `spec`."""
    return w.shard_specs(spec, exact) if is_implicit(w) else spec


def registering(rules: dict[str, Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    """`@rule(*names)`, which puts a function into `rules` for each of these primitives."""

    def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(f: Callable[..., Any]) -> Callable[..., Any]:
            rules.update(dict.fromkeys(names, f))
            return f

        return register

    return rule


def whole(leaf: ImplicitLeaf) -> bool:
    """`has_its_axes` of the leaf and of those within it."""
    within = jax.tree.leaves(leaf, is_leaf=lambda value: value is not leaf and is_implicit(value))
    return leaf.has_its_axes() and all(map(whole, filter(is_implicit, within)))


class MaterialisedWarning(UserWarning):
    """A weight had to be built as W + scaling * A·B: exact, only slower. Said once a parameter and primitive."""


def materialise(value: Any, where: str, strict: bool) -> Any:
    """`value` as an array. `where`: the primitive (or place) that needed it, for the warning.

    Raises ValueError if `strict`.
    """
    if not is_implicit(value):
        return value
    text = f"the weight {value.path or '(unnamed)'} {list(value.shape)} was materialised for {where}"
    if strict:
        raise ValueError(f"{text}, which strict=True forbids: leave it out of the targets, or lift without strict")
    dense = value.materialise()  # first: a leaf that is no weight refuses
    warnings.warn(f"{text}: exact, only slower", MaterialisedWarning, stacklevel=2)
    return dense


class AroundLeaf(ImplicitLeaf):
    """A leaf around a weight `w` (an array or another leaf), whose shape and dtype are its own."""

    w: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        return self.w.dtype


class LabelledLeaf(AroundLeaf):
    """A weight `w` and arrays beside it, each of whose axes runs along an axis of w.

    Subclasses say which arrays: `parts` and `with_parts`. What only moves axes (`jlora/rules_structure.py`), a scan and
    a sharding are then done to w and to them alike.
    """

    def parts(self) -> dict[str, tuple[Any, Labels]]:
        """The arrays by name, each with the labels of its axes."""
        raise NotImplementedError

    def with_parts(self, w: Any, parts: dict[str, tuple[Any, Labels]]) -> Any:
        """The leaf with another w, arrays and labels."""
        raise NotImplementedError

    def allows_cut(self, axis: int) -> bool:
        """Whether the leaf of some rows along `axis` is these rows of the leaf."""
        return True

    def map_parts(self, w: Any, change: Callable[[Any, Labels], Any], rename: Callable[[int], int | None]) -> Any:
        """The leaf after a structural change that made `w`: `change(array, labels)` is done to each array, `rename`
        gives each old axis of the weight its new number, or None where the axis is gone."""

        def part(array: Any, labels: Labels) -> tuple[Any, Labels]:
            named = [ax if ax == RANK else rename(ax) for ax in labels]
            return change(array, labels), tuple(ax for ax in named if ax is not None)

        return self.with_parts(w, {name: part(*held) for name, held in self.parts().items()})

    def has_its_axes(self) -> bool:
        return all(array.ndim >= len(at) and max(at, default=0) < self.ndim for array, at in self.parts().values())

    def unstack(self) -> tuple[Any, Callable[[Any], Any]] | None:
        within = unstacked(self.w)
        if within is None or not self.allows_cut(0):
            return None
        w, rebuild_w = within
        parts = self.parts()
        stacked = {name: jnp.moveaxis(array, at.index(0), 0) for name, (array, at) in parts.items() if 0 in at}

        def lower(labels: Labels) -> Labels:
            return tuple(ax if ax == RANK else ax - 1 for ax in labels if ax != 0)

        def rebuild(row: Any) -> Any:
            w, rows = row
            lowered = {name: (rows.get(name, array), lower(labels)) for name, (array, labels) in parts.items()}
            return self.with_parts(rebuild_w(w), lowered)

        return (w, stacked), rebuild

    def shard_specs(self, spec: Any, exact: bool = True) -> Any:
        full = tuple(spec) + (None,) * (self.ndim - len(spec))
        w = specs_of(self.w, spec, exact)
        if w is None or any(name is not None and not self.allows_cut(ax) for ax, name in enumerate(full)):
            return None

        def of(labels: Labels) -> PartitionSpec:
            return PartitionSpec(*(None if ax == RANK else full[ax] for ax in labels))

        return self.with_parts(w, {name: (of(labels), labels) for name, (_, labels) in self.parts().items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraLeaf(LabelledLeaf):
    """W + scaling * A·B, kept as the triple (Hu et al., section 4.1; their B·A is this A·B transposed).

    `w`: the frozen weight, an array or another implicit leaf.
    `lora_a`, `lora_b`: the factors; `a_axes` and `b_axes` label their axes. For a kernel [i, o] that is a: (0, RANK),
    b: (RANK, 1); for a stack [s, i, o] it is (0, 1, RANK) and (0, RANK, 2). An axis in both factors is a stack (every
    index has its own product); an axis in neither is one along which the difference is constant (a broadcast).
    Transposing W therefore only renames.
    `key`: PRNG keys of the dropout on the input of A, one a stacked matrix (`key_axes`), or None.
    """

    w: Any
    lora_a: Any
    lora_b: Any
    key: Any = None
    a_axes: Labels = dataclasses.field(default=(0, RANK), metadata={"static": True})
    b_axes: Labels = dataclasses.field(default=(RANK, 1), metadata={"static": True})
    key_axes: Labels = dataclasses.field(default=(), metadata={"static": True})
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = {}
    trainable: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")

    def parts(self) -> dict[str, tuple[Any, Labels]]:
        factors = {"lora_a": (self.lora_a, self.a_axes), "lora_b": (self.lora_b, self.b_axes)}
        return factors if self.key is None else factors | {"key": (self.key, self.key_axes)}

    def with_parts(self, w: Any, parts: dict[str, tuple[Any, Labels]]) -> LoraLeaf:
        (a, a_axes), (b, b_axes) = parts["lora_a"], parts["lora_b"]
        key, key_axes = parts.get("key", (None, ()))
        labels = {"a_axes": a_axes, "b_axes": b_axes, "key_axes": key_axes}
        return dataclasses.replace(self, w=w, lora_a=a, lora_b=b, key=key, **labels)

    def delta(self) -> jax.Array:
        """scaling * A·B in float32 or better, with axes of size 1 where W's axis is in neither factor."""
        every, factors = tuple(range(self.ndim)), (self.lora_a, self.a_axes, self.lora_b, self.b_axes)
        wide = jnp.promote_types(jnp.result_type(self.lora_a, self.lora_b), jnp.float32)
        return contract(*factors, every, precision="highest", preferred_element_type=wide) * self.scaling

    def unrounded(self) -> jax.Array:
        return unrounded(self.w) + self.delta()

    def materialise(self) -> jax.Array:
        return self.unrounded().astype(self.dtype)


def contract(
    x: Any, x_axes: tuple[Any, ...], y: Any, y_axes: tuple[Any, ...], out_axes: tuple[Any, ...], **dot: Any
) -> jax.Array:
    """One pairwise contraction by axis labels, as one `dot_general` and at most one transpose.

    Labels in both and in `out_axes` are batched, labels in both and not in `out_axes` are summed, labels in one
    operand and not in `out_axes` are summed before; an output label in neither becomes an axis of size 1.
    `dot`: precision and preferred_element_type of the product.
    """

    def drop(array: Any, axes: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        lone = tuple(n for n, ax in enumerate(axes) if ax not in other and ax not in out_axes)
        kept = tuple(ax for n, ax in enumerate(axes) if n not in lone)
        return (jnp.sum(array, axis=lone) if lone else array), kept

    x, x_axes = drop(x, x_axes, y_axes)
    y, y_axes = drop(y, y_axes, x_axes)
    both = [ax for ax in x_axes if ax in y_axes]
    batch = [ax for ax in both if ax in out_axes]
    summed = [ax for ax in both if ax not in out_axes]
    dims = (
        (tuple(x_axes.index(ax) for ax in summed), tuple(y_axes.index(ax) for ax in summed)),
        (tuple(x_axes.index(ax) for ax in batch), tuple(y_axes.index(ax) for ax in batch)),
    )
    have = batch + [ax for ax in x_axes if ax not in both] + [ax for ax in y_axes if ax not in both]
    out = lax.dot_general(x, y, dims, **dot, **lying((x, x_axes), (y, y_axes), have))
    present = [ax for ax in out_axes if ax in have]
    if present != have:
        out = lax.transpose(out, tuple(have.index(ax) for ax in present))
    missing = tuple(n for n, ax in enumerate(out_axes) if ax not in have)
    return lax.expand_dims(out, missing) if missing else out
