"""`AdapterBank`: slots for adapters beside one frozen base; names in, the tree of a mixed batch out.

Slot 0 is "none": zero factors, the base itself. The arrays' shapes are slots, rank and adapted weights; only when one
of these grows does a function jitted over the tree compile again. Adding, replacing and removing write into the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jlora.bank.leaf import BankFactors, Method
from jlora.leaves import is_implicit
from jlora.lora import LoraFactors, axes_of, is_adapter
from jlora.methods.plant import leaves_of
from jlora.tree import path_of


class BankFull(ValueError):
    """Every slot holds an adapter in use."""


def with_rows(tree: Any, rows: Any) -> Any:
    """The bank's tree for a batch whose row b has the adapter of slot rows[b], i32 [b]; works inside `jit`."""
    put = lambda entry: dataclasses.replace(entry, rows=rows) if is_adapter(entry) else entry
    return jax.tree.map(put, tree, is_leaf=is_adapter)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def write(array: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, axis)


def sized(held: BankFactors, slots: int, rank: int) -> BankFactors:
    """`held` with so many slots of such a rank; what is new is zero, what is cut off must hold nothing."""
    at = len(axes_of(held.layout, "s"))
    if (held.slots, held.a.shape[at]) == (slots, slots * rank):
        return held
    a, b = (resized(x, at, held.slots, slots, rank) for x in (held.a, held.b))
    return dataclasses.replace(held, a=a, b=b, slots=slots)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def resized(x: jax.Array, at: int, held: int, slots: int, rank: int) -> jax.Array:
    x = x.reshape(*x.shape[:at], held, -1, *x.shape[at + 1 :])
    x = x[(slice(None),) * at + (slice(slots), slice(rank))]
    room = [(0, 0)] * x.ndim
    room[at : at + 2] = [(0, slots - x.shape[at]), (0, rank - x.shape[at + 1])]
    return jnp.pad(x, room).reshape(*x.shape[:at], slots * rank, *x.shape[at + 2 :])


@jax.jit
def summed(w: jax.Array, held: BankFactors, slot: Any) -> jax.Array:
    """W and the difference of one slot, in W's dtype."""
    at = len(axes_of(held.layout, "s"))
    rank = held.a.shape[at] // held.slots
    a, b = (jax.lax.dynamic_slice_in_dim(x, slot * rank, rank, at) for x in (held.a, held.b))
    return LoraFactors(jnp.moveaxis(a, at, -1), b, 1.0, held.layout).attach(w, "").materialise()


class AdapterBank:
    """Adapters of any ranks over `params`, by key (a name, or any hashable).

        bank = AdapterBank(params, capacity=8)
        bank.add("film", lora)                                   # what `lorafy` or `load_adapter` gave
        apply({"params": jlora.combine(params, bank.tree(["film", None, "film"]))}, tokens)   # three rows

    capacity: slots for adapters; rank: of each slot. Both double, up to `most` adapters, when they do not suffice
    (the jitted functions then compile once more); at `most` the adapter longest unused makes room.
    method: the form of the product (`jlora/bank/leaf.py`). dtype: of the factors.

    A tree taken before an `add` is spent by it: its arrays are written in place.
    """

    def __init__(
        self,
        params: Any,
        *,
        capacity: int = 8,
        rank: int = 8,
        most: int | None = None,
        dtype: Any = jnp.float32,
        method: Method = "auto",
    ) -> None:
        if capacity < 1 or rank < 1:
            raise ValueError(f"capacity {capacity}, rank {rank}: both are 1 or more")
        if method not in get_args(Method):
            raise ValueError(f"method {method!r}: {', '.join(get_args(Method))}")
        self.capacity, self.rank, self.most = capacity, rank, capacity if most is None else most
        if self.most < capacity:
            raise ValueError(f"most = {most} is below the capacity {capacity}")
        self.dtype = dtype
        self.method: Method = method
        self.shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves_of(params).items()}
        self.structure = jax.tree.structure(params, is_leaf=is_implicit)
        self.factors: dict[str, BankFactors] = {}
        self.slots: OrderedDict[Hashable, int] = OrderedDict()  # the longest unused first
        self.pins: dict[Hashable, int] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    def slot(self, key: Hashable | None) -> int:
        """The slot of an adapter (0 for None), which counts as used now. Raises KeyError if it is not here."""
        if key is None:
            return 0
        self.slots.move_to_end(key)
        return self.slots[key]

    def tree(self, keys: Sequence[Hashable | None] | None = None) -> Any:
        """What `jlora.combine` takes with the base; `keys`: the adapter of each row, None for the base alone."""
        leaves = [self.factors.get(path) for path in self.shapes]
        tree = jax.tree.unflatten(self.structure, leaves)
        return tree if keys is None else with_rows(tree, jnp.asarray([self.slot(key) for key in keys], jnp.int32))

    def merged(self, params: Any, key: Hashable | None) -> Any:
        """The base's weights with an adapter's difference added: those that it does not touch are the same buffers.

        Compiles a program for each shape of an adapted weight. Raises KeyError if the adapter is not here.
        """
        if key is None:
            return params
        slot = jnp.asarray(self.slot(key), jnp.int32)
        at = lambda keys, w: summed(w, held, slot) if (held := self.factors.get(path_of(keys))) else w
        return jax.tree_util.tree_map_with_path(at, params, is_leaf=is_implicit)

    def add(self, key: Hashable, lora: Any) -> int:
        """Put an adapter in, in the place of one of the same key; returns its slot.

        Raises ValueError for anything but LoRA factors of matrices of this base, BankFull if nothing may make room.
        """
        if key is None:
            raise ValueError("None is the base without an adapter: give the adapter a name")
        entries = self.checked(key, lora)
        rank = max((entry.lora_a.shape[-1] for entry in entries.values()), default=1)
        slot = self.slots[key] if key in self.slots else self.free_slot()
        if key not in self.pins:  # until all is written it is not here: what breaks off on the way leaves a free slot
            self.slots.pop(key, None)
        wide = self.rank
        while wide < rank:
            wide *= 2
        self.resize(self.capacity, wide)
        for path, entry in entries.items():
            if path not in self.factors:
                self.factors[path] = self.empty(path, entry.layout)
        for path, held in self.factors.items():
            self.factors[path] = self.written(held, entries.get(path), slot)
        self.slots[key] = slot
        self.slots.move_to_end(key)
        return slot

    def remove(self, key: Hashable) -> None:
        """Take an adapter out. Its factors stay until the slot is written again. Raises KeyError if it is not here."""
        del self.slots[key]
        self.pins.pop(key, None)

    def pin(self, key: Hashable | None) -> int:
        """As `slot`; until `unpin` the adapter makes no room for another."""
        slot = self.slot(key)
        if key is not None:
            self.pins[key] = self.pins.get(key, 0) + 1
        return slot

    def unpin(self, key: Hashable | None) -> None:
        if key in self.pins:
            self.pins[key] -= 1
            if not self.pins[key]:
                del self.pins[key]

    # ------------------------------------------------------------ arrays

    def checked(self, key: Hashable, lora: Any) -> dict[str, LoraFactors]:
        """The entries of `lora` by path, if all are factors that fit this base and finite in the bank's dtype."""
        found = jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_adapter)[0]
        entries = {path_of(keys): entry for keys, entry in found}
        for path, entry in entries.items():
            if not isinstance(entry, LoraFactors) or path.endswith("/embedding"):
                kind = "an embedding" if isinstance(entry, LoraFactors) else type(entry).__name__
                raise ValueError(f"adapter {key!r}: {path} is {kind}; a bank holds LoRA factors of matrices: merge it")
            held = self.factors.get(path)
            fits = path in self.shapes and len(entry.layout) == len(self.shapes[path])
            if not fits or parts_of(entry, 0)[2] != self.shapes[path] or (held and held.layout != entry.layout):
                want = list(self.shapes[path]) if path in self.shapes else "nothing of this name"
                have = [list(entry.lora_a.shape), list(entry.lora_b.shape)]
                raise ValueError(f"adapter {key!r}: {path} has factors {have}, the base {want}")
            kind = jnp.dtype(self.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                finite = all(np.isfinite(part.astype(kind)).all() for part in parts_of(entry, 0)[:2])
            if not finite:
                raise ValueError(f"adapter {key!r}: {path} has factors that are not finite once scaled, in {kind.name}")
        return entries

    def free_slot(self) -> int:
        taken = set(self.slots.values())
        free = next((n for n in range(1, self.capacity + 1) if n not in taken), None)
        if free is not None:
            return free
        if self.capacity < self.most:
            free = self.capacity + 1
            self.resize(min(2 * self.capacity, self.most), self.rank)
            return free
        oldest = next((key for key in self.slots if key not in self.pins), None)
        if oldest is None:
            raise BankFull(f"all {self.capacity} adapter slots are in use")
        return self.slots.pop(oldest)

    def empty(self, path: str, layout: str) -> BankFactors:
        shape, width = self.shapes[path], (self.capacity + 1) * self.rank
        stack, i, o = (tuple(shape[ax] for ax in axes_of(layout, letter)) for letter in "sio")
        zeros = lambda *axes: jnp.zeros(axes, self.dtype)
        a, b = zeros(*stack, width, *i), zeros(*stack, width, *o)
        return BankFactors(a, b, None, self.capacity + 1, layout, self.method)

    def resize(self, capacity: int, rank: int) -> None:
        """Room for so many adapters of such a rank, one weight after the other; if it breaks off, all is as before."""
        try:
            for path, held in self.factors.items():
                self.factors[path] = sized(held, capacity + 1, rank)
        except BaseException:
            for path, held in self.factors.items():  # most often memory was short: give back what had grown
                self.factors[path] = sized(held, self.capacity + 1, self.rank)
            raise
        self.capacity, self.rank = capacity, rank

    def written(self, held: BankFactors, entry: LoraFactors | None, slot: int) -> BankFactors:
        """`held` with an adapter's factors, or zeros, in a slot."""
        at = len(axes_of(held.layout, "s"))
        rank = held.a.shape[at] // held.slots  # its own: a resize that broke off may have left it wider than the others
        if entry is None:
            a, b = (np.zeros((*x.shape[:at], rank, *x.shape[at + 1 :]), np.float32) for x in (held.a, held.b))
        else:
            a, b, _ = parts_of(entry, rank)
        # on the device before either is written, as a written array is given away
        a, b, start = (jnp.asarray(x) for x in (a, b, np.int32(slot * rank)))
        return dataclasses.replace(held, a=write(held.a, a, start, at), b=write(held.b, b, start, at))


def parts_of(entry: LoraFactors, rank: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """(a [*stack, rank, *in], b [*stack, rank, *out] scaled, the weight's shape); padded with zeros up to `rank`."""
    a, b = np.asarray(entry.lora_a, np.float32), np.asarray(entry.lora_b, np.float32)
    at = len(axes_of(entry.layout, "s"))
    a = np.moveaxis(a, -1, at)
    room = lambda x: [(0, max(rank - x.shape[at], 0) if n == at else 0) for n in range(x.ndim)]
    shape = [0] * len(entry.layout)
    for letter, sizes in (("s", a.shape[:at]), ("i", a.shape[at + 1 :]), ("o", b.shape[at + 1 :])):
        for ax, size in zip(axes_of(entry.layout, letter), sizes, strict=False):
            shape[ax] = size
    with np.errstate(over="ignore", invalid="ignore"):  # `checked` has seen that it is finite
        b = b * np.asarray(entry.scaling, np.float32)
    return np.pad(a, room(a)), np.pad(b, room(b)), tuple(shape)
