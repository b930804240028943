"""A weight kept in 8 or 4 bits, and how it goes through each primitive.

It stands as `w` under any other leaf: LoRA on it is QLoRA. A product writes the one matrix it needs out, in the dtype
of the computation, and forgets it: the gradient of x is taken by the matrix written out again, so that none is kept
from the forward pass to the backward one. Codes have no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.leaves import ImplicitLeaf, registering
from jlora.lora import axes_of
from jlora.placing import dividing

Step = tuple[str, Any]
"""What became of one matrix: ("transpose", permutation), ("reshape", sizes) or ("slice", (start, limit, strides))."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedLeaf(ImplicitLeaf):
    """Matrices [i, o] by a scheme, stacked or alone; the weight is them with `steps` on each and `order` on all.

    `parts`: the scheme's arrays, each with the stack's axes first. `rows`: i. `stack`: number of stack axes.
    `kind`: the weight's dtype. `layout`: the letters of the weight that was quantised. `order`: where each axis of the
    weight lies among (stack, then the matrix's); None: as they are.
    `used`: how one weight of this layout lies on the devices while it is used (`over`), or None.
    """

    parts: dict[str, Any]
    scheme: Any = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    kind: Any = dataclasses.field(metadata={"static": True})
    stack: int = dataclasses.field(default=0, metadata={"static": True})
    steps: tuple[Step, ...] = dataclasses.field(default=(), metadata={"static": True})
    order: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    layout: str = dataclasses.field(default="io", metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})
    used: NamedSharding | None = dataclasses.field(default=None, metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., Any]]] = {}

    @property
    def dtype(self) -> Any:
        return self.kind

    @property
    def stacked(self) -> tuple[int, ...]:
        """The sizes of the stack's axes."""
        return tuple(self.parts["codes"].shape[: self.stack])

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one matrix after `steps`."""
        shape = (self.rows, self.parts["codes"].shape[-1])
        for step in self.steps:
            shape = moved_shape(shape, step)
        return shape

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.stacked + self.inner
        return whole if self.order is None else tuple(whole[ax] for ax in self.order)

    def materialise(self) -> jax.Array:
        return written_out(dataclasses.replace(self, path="", layout=""))  # one compilation for all of this shape

    def unrounded(self) -> jax.Array:
        return dataclasses.replace(self, kind=jnp.promote_types(self.kind, jnp.float32)).materialise()

    def on_stack(self, change: Callable[[Any], Any], axes: int) -> QuantisedLeaf:
        """The leaf whose arrays went through `change`, which leaves `axes` stack axes."""
        return dataclasses.replace(self, parts=jax.tree.map(change, self.parts), stack=axes)

    def then(self, *steps: Step) -> QuantisedLeaf:
        return dataclasses.replace(self, steps=self.steps + steps)

    def lowered(self, kept: Any) -> QuantisedLeaf:
        """The leaf with the stack's axes `kept` alone; its arrays are to be changed likewise."""
        gone = self.stack - len(kept)
        used = self.used
        if used is not None:
            full = tuple(used.spec)
            used = NamedSharding(used.mesh, PartitionSpec(*(full[ax] for ax in kept), *full[self.stack :]))
        layout = self.layout.replace("s", "", gone)
        return dataclasses.replace(self, stack=len(kept), used=used, layout=layout)

    def has_its_axes(self) -> bool:
        return self.parts["codes"].ndim >= self.stack + 2

    def unstack(self) -> tuple[Any, Callable[[Any], Any]] | None:
        if not self.stack or self.order is not None:
            return None
        row_of = self.lowered(range(1, self.stack))
        return self.parts, lambda parts: dataclasses.replace(row_of, parts=parts)

    # -------------------------------------------------------------- devices

    def by_axes(self, spec: Any) -> dict[str, PartitionSpec]:
        """The arrays' specs, each along the stack's, the inputs' and the outputs' names in the weight's `spec`."""
        full = tuple(spec) + (None,) * (len(self.layout) - len(spec))
        stack = tuple(full[ax] for ax in axes_of(self.layout, "s"))
        names = {letter: joined(full[ax] for ax in axes_of(self.layout, letter)) for letter in "io"}
        along = self.scheme.along
        return {name: PartitionSpec(*stack, *(names[ax] for ax in along[name])) for name in self.parts}

    def shard_specs(self, spec: Any, exact: bool = True) -> Any:
        """Exact only where no block is cut: outputs may be split, with double quantisation nothing but the stack."""
        split = [letter for letter, name in zip(self.layout, tuple(spec), strict=False) if name is not None]
        nested = any(not self.scheme.along[name] for name in self.parts)
        if exact and (self.steps or self.order is not None or "i" in split or (nested and "o" in split)):
            return None
        return dataclasses.replace(self, parts=self.by_axes(spec))

    def over(self, mesh: Any, spec: Any) -> QuantisedLeaf:
        """The leaf whose codes are laid out by the weight's `spec` on `mesh` before a product writes the weight out:
        what lies split any other way is moved as codes, never as the weight."""
        return dataclasses.replace(self, used=NamedSharding(mesh, self.by_axes(spec)["codes"]))


def joined(names: Any) -> Any:
    """Mesh axes of several merged axes, as one entry of a PartitionSpec."""
    flat = [name for entry in names if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)]
    return None if not flat else flat[0] if len(flat) == 1 else tuple(flat)


def moved_shape(shape: tuple[int, ...], step: Step) -> tuple[int, ...]:
    kind, how = step
    if kind == "transpose":
        return tuple(shape[ax] for ax in how)
    if kind == "reshape":
        return how
    start, limit, strides = how
    return tuple(-(-(hi - lo) // by) for lo, hi, by in zip(start, limit, strides, strict=True))


def moved(w: jax.Array, step: Step) -> jax.Array:
    kind, how = step
    if kind == "transpose":
        return lax.transpose(w, how)
    return lax.reshape(w, how) if kind == "reshape" else lax.slice(w, *how)


@jax.jit
def written_out(leaf: QuantisedLeaf) -> jax.Array:
    """The weight [*shape]. One compiled function, so that outside `jit` too no step of it is an array of its own."""

    def one(parts: Any) -> jax.Array:
        w = leaf.scheme.decode(parts, leaf.rows).astype(leaf.dtype)
        for step in leaf.steps:
            w = moved(w, step)
        return w

    for _ in range(leaf.stack):
        one = jax.vmap(one)
    parts = leaf.parts
    if leaf.used is not None:
        parts = {name: gathered(array, leaf, leaf.scheme.along[name]) for name, array in parts.items()}
    w = one(lax.stop_gradient(parts))
    return w if leaf.order is None else lax.transpose(w, leaf.order)


def gathered(array: jax.Array, leaf: QuantisedLeaf, along: str) -> jax.Array:
    """An array of the leaf laid out as `used` says; an axis that does not divide is whole."""
    assert leaf.used is not None
    spec = (*leaf.used.spec, *(None,) * (leaf.stack + 2 - len(leaf.used.spec)))
    names = (*spec[: leaf.stack], *(spec[leaf.stack + "io".index(ax)] for ax in along))
    return lax.with_sharding_constraint(
        array, NamedSharding(leaf.used.mesh, dividing(array.shape, names, leaf.used.mesh))
    )


# ---------------------------------------------------------------- rules


rule = registering(QuantisedLeaf.rules)


@rule("dot_general", "conv_general_dilated", "ragged_dot_general")
def product(eqn: Any, bind: Callable[..., Any], position: int, *operands: Any) -> Any:
    """The product with the weight written out, and written out again for the gradient."""

    @jax.checkpoint
    def with_weight(*operands: Any) -> Any:
        return bind(*(x.materialise() if n == position else x for n, x in enumerate(operands)))

    return with_weight(*operands)


@rule("convert_element_type")
def convert(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    """The dtype it is written out in: not first in another."""
    kind = eqn.params["new_dtype"]
    return dataclasses.replace(leaf, kind=jnp.dtype(kind)) if jnp.issubdtype(kind, jnp.floating) else NotImplemented


@rule("copy", "copy_p", "pvary", "pcast")
def same(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    return leaf.on_stack(bind, leaf.stack)


@rule("name", "sharding_constraint", "stop_gradient")
def unchanged(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    """A name or a place for an array that is not there, or no gradient where there is none."""
    return leaf


@rule("transpose")
def transpose(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    order = leaf.order or tuple(range(leaf.ndim))
    order = tuple(order[ax] for ax in eqn.params["permutation"])
    n = leaf.stack
    if order[:n] != tuple(range(n)):
        return dataclasses.replace(leaf, order=order)
    return dataclasses.replace(leaf, order=None).then(("transpose", tuple(ax - n for ax in order[n:])))


@rule("reshape", "squeeze")
def reshape(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, *dynamic: Any) -> Any:
    """Of the matrix; axes of size 1 of the stack may go."""
    new = tuple(eqn.outvars[0].aval.shape)
    reshaped = "new_sizes" in eqn.params
    if dynamic or leaf.order is not None or (reshaped and eqn.params["dimensions"] is not None):
        return NotImplemented
    stacked = leaf.stacked
    axes = range(leaf.stack)
    if reshaped:
        kept = [ax for ax in axes if new[: leaf.stack] == stacked or stacked[ax] > 1]
    else:
        kept = [ax for ax in axes if ax not in eqn.params["dimensions"]]
    sizes = tuple(stacked[ax] for ax in kept)
    if new[: len(sizes)] != sizes or math.prod(new) == 0:
        return NotImplemented
    if len(kept) < leaf.stack:
        parts = {name: x.reshape(*sizes, *x.shape[leaf.stack :]) for name, x in leaf.parts.items()}
        leaf = dataclasses.replace(leaf.lowered(kept), parts=parts)
    return leaf if leaf.inner == new[len(sizes) :] else leaf.then(("reshape", new[len(sizes) :]))


@rule("slice")
def slice_(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    if leaf.order is not None:
        return NotImplemented
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * leaf.ndim
    n = leaf.stack
    cut = tuple(slice(*at) for at in zip(start[:n], limit[:n], strides[:n], strict=True))
    leaf = leaf.on_stack(lambda x: x[cut], n) if cut else leaf
    if (tuple(start[n:]), tuple(limit[n:])) == ((0,) * len(leaf.inner), leaf.inner) and set(strides[n:]) <= {1}:
        return leaf
    return leaf.then(("slice", (tuple(start[n:]), tuple(limit[n:]), tuple(strides[n:]))))


@rule("dynamic_slice")
def dynamic_slice(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any, *starts: Any) -> Any:
    """Of the stack alone."""
    sizes, n = eqn.params["slice_sizes"], leaf.stack
    if position != 0 or leaf.order is not None or tuple(sizes[n:]) != leaf.inner:
        return NotImplemented

    def cut(x: Any) -> Any:
        zeros = [jnp.zeros((), jnp.asarray(starts[0]).dtype)] * (x.ndim - n)
        return lax.dynamic_slice(x, [*starts[:n], *zeros], [*sizes[:n], *x.shape[n:]])

    return leaf.on_stack(cut, n)


@rule("split")
def split(eqn: Any, bind: Callable[..., Any], position: int, leaf: Any) -> Any:
    axis, at, pieces = eqn.params["axis"] - leaf.stack, 0, []
    if leaf.order is not None or axis < 0:
        return NotImplemented
    for size in eqn.params["sizes"]:
        start = tuple(at if ax == axis else 0 for ax in range(len(leaf.inner)))
        limit = tuple(at + size if ax == axis else n for ax, n in enumerate(leaf.inner))
        pieces.append(leaf.then(("slice", (start, limit, (1,) * len(start)))))
        at += size
    return pieces
