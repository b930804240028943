"""What a weight can be: an array, or an object that knows how it is used.

An `ImplicitLeaf` stands where a weight stood. It has the weight's shape and dtype, and for each JAX primitive it
understands it gives a method that computes the primitive's result without building the weight. `lift` calls those
methods; whatever a leaf does not understand, `lift` asks it to `materialise`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

RANK = -1
"""The label of the rank axis in `LoraLeaf.a_axes` and `b_axes`; a label >= 0 is an axis of the weight."""


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

    def materialise(self) -> jax.Array:
        """The weight as one array [*shape], exact."""
        raise NotImplementedError

    def unstack(self) -> tuple[Any, Callable[[Any], Any]]:
        """(stacked, rebuild): `rebuild` makes the leaf W[i] from the i-th rows of the pytree `stacked`."""
        return self.materialise(), lambda row: row

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraLeaf(ImplicitLeaf):
    """W + scaling * A·B, kept as the triple (Hu et al., section 4.1; their B·A is this A·B transposed).

    `w`: the frozen weight, an array or another implicit leaf.
    `lora_a`, `lora_b`: the factors; `a_axes` and `b_axes` name each of their axes by the axis of W it runs along, or
    `RANK`. For a kernel [i, o] that is a: (0, RANK), b: (RANK, 1); for a stack [s, i, o] it is (0, 1, RANK) and
    (0, RANK, 2). An axis in both factors is a stack (every index has its own product); an axis in neither is one
    along which the difference is constant (a broadcast). Transposing W therefore only renames.
    `key`: PRNG keys of the dropout on the input of A, one a stacked matrix (`key_axes`), or None.
    """

    w: Any
    lora_a: Any
    lora_b: Any
    key: Any = None
    a_axes: tuple[int, ...] = dataclasses.field(default=(0, RANK), metadata={"static": True})
    b_axes: tuple[int, ...] = dataclasses.field(default=(RANK, 1), metadata={"static": True})
    key_axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = {}
    trainable: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    def delta(self) -> jax.Array:
        """scaling * A·B in the factors' own precision, with axes of size 1 where W's axis is in neither factor."""
        every = tuple(range(self.ndim))
        product = contract(self.lora_a, self.a_axes, self.lora_b, self.b_axes, every, precision="highest")
        return product * self.scaling

    def materialise(self) -> jax.Array:
        w = self.w.materialise() if is_implicit(self.w) else jnp.asarray(self.w)
        return (w + self.delta()).astype(self.dtype)

    def map_parts(
        self, on_w: Any, on_factor: Callable[[Any, tuple[int, ...]], Any], rename: Callable[[int], int | None]
    ) -> LoraLeaf:
        """The leaf after a structural change: `on_w` replaces w, `on_factor(array, axes)` changes each factor and
        `rename` gives each old axis of W its new number, or None where the axis is gone."""

        def part(array: Any, axes: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
            named = [ax if ax == RANK else rename(ax) for ax in axes]
            return on_factor(array, axes), tuple(ax for ax in named if ax is not None)

        a, a_axes = part(self.lora_a, self.a_axes)
        b, b_axes = part(self.lora_b, self.b_axes)
        key, key_axes = (None, ()) if self.key is None else part(self.key, self.key_axes)
        return dataclasses.replace(
            self, w=on_w, lora_a=a, lora_b=b, key=key, a_axes=a_axes, b_axes=b_axes, key_axes=key_axes
        )

    def has_its_axes(self) -> bool:
        named = ((self.lora_a, self.a_axes), (self.lora_b, self.b_axes))
        return all(array.ndim >= len(axes) and max(axes) < self.ndim for array, axes in named)

    def unstack(self) -> tuple[Any, Callable[[Any], Any]]:
        fixed: dict[str, Any] = {}
        stacked: dict[str, Any] = {}
        rebuild_w: Callable[[Any], Any] = lambda row: row
        if is_implicit(self.w):
            stacked["w"], rebuild_w = self.w.unstack()
        else:
            stacked["w"] = self.w
        for name, axes in (("lora_a", self.a_axes), ("lora_b", self.b_axes), ("key", self.key_axes)):
            array = getattr(self, name)
            if array is not None and 0 in axes:
                stacked[name] = jnp.moveaxis(array, axes.index(0), 0)
            else:
                fixed[name] = array

        def lower(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(ax if ax == RANK else ax - 1 for ax in axes if ax != 0)

        def rebuild(row: dict[str, Any]) -> LoraLeaf:
            parts = {**fixed, **row, "w": rebuild_w(row["w"])}
            return dataclasses.replace(
                self, **parts, a_axes=lower(self.a_axes), b_axes=lower(self.b_axes), key_axes=lower(self.key_axes)
            )

        return stacked, rebuild

    def shard_specs(self, spec: Any, exact: bool = True) -> Any:
        full = tuple(spec) + (None,) * (self.ndim - len(spec))

        def of(axes: tuple[int, ...]) -> PartitionSpec:
            return PartitionSpec(*(None if ax == RANK else full[ax] for ax in axes))

        w = self.w.shard_specs(spec, exact) if is_implicit(self.w) else spec
        key = None if self.key is None else of(self.key_axes)
        return (
            None
            if w is None
            else dataclasses.replace(self, w=w, lora_a=of(self.a_axes), lora_b=of(self.b_axes), key=key)
        )


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


def on_explicit_mesh(*arrays: Any) -> bool:
    """Whether one lies on a mesh whose axes are part of types (`AxisType.Explicit`, what `jax.make_mesh` makes)."""
    return any(AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types for x in arrays)


def lying(x: tuple[Any, Any], y: tuple[Any, Any], out_axes: Sequence[Any]) -> dict[str, Any]:
    """`out_sharding` of a product on an explicit mesh, where it must be said if what is summed is split: each axis as
    in the operand that has it, a mesh axis once. Operands are (array, its axes). Else nothing."""
    if not on_explicit_mesh(x[0], y[0]):
        return {}
    names: dict[Any, Any] = {}
    for array, axes in (x, y):
        taken = set(jax.tree.leaves(list(names.values())))
        for ax, name in zip(axes, jax.typeof(array).sharding.spec, strict=True):
            if ax in out_axes and names.get(ax) is None and not taken & set(jax.tree.leaves(name)):
                names[ax] = name
    where = next(jax.typeof(v).sharding.mesh for v, _ in (x, y) if on_explicit_mesh(v))
    return {"out_sharding": NamedSharding(where, PartitionSpec(*(names.get(ax) for ax in out_axes)))}
