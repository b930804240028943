"""A run over the devices there are: where weights, state and batches lie. On one device nothing is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora import batch_parts, sharding
from jlora.commands.folder import remote
from jlora.commands.settings import TrainConfig
from jlora.compiled import keep_compiled
from jlora.io import Pretrained, load
from jlora.models.attention import Attention, attending, named
from jlora.train import TrainState
from jlora.tree import paths


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mesh, None for one device, and the layouts of the model's weights."""

    mesh: Any = None
    layouts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention: str = "auto"
    platform: str = ""
    """What the attention fits; "": the devices that are here."""

    @property
    def way(self) -> Attention:
        """The attention that was asked for."""
        return named(self.attention, self.platform or jax.default_backend())

    def sums(self, sums: Callable[..., Any]) -> Callable[..., Any]:
        """The objective, over split batches, with the attention that was asked for."""
        attention = self.way
        if self.mesh is not None:
            return batch_parts.over_batch(sums, self.mesh, attention)

        def alone(*args: Any) -> Any:
            with attending(attention):
                return sums(*args)

        return alone

    def rows(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run(trained, frozen, batch)`, one result a row, compiled for the data's own batches; every process gets all
        of them."""
        if self.mesh is None:
            return jax.jit(run)
        mesh, attention = self.mesh, self.way
        parts = batch_parts.over_parts(lambda *args: run(*args[:3]), mesh, attention)

        def whole(trained: Any, frozen: Any, batch: Any) -> Any:
            out = parts(trained, frozen, batch, None)
            return jax.lax.with_sharding_constraint(
                out.reshape(-1, *out.shape[2:]), NamedSharding(mesh, PartitionSpec())
            )

        return self.step(jax.jit(whole))

    def tree(self, tree: Any) -> Any:
        """Weights or a trained tree, laid out."""
        if self.mesh is None:
            return tree
        return sharding.place(tree, sharding.specs(tree, self.layouts, self.mesh), self.mesh)

    def state(self, state: TrainState) -> TrainState:
        """The train state; the optimiser's arrays follow what they are of."""
        if self.mesh is None:
            return state
        trained = sharding.specs(state.trained, self.layouts, self.mesh)
        follow = sharding.like(state.opt_state, state.trained, trained)
        return sharding.place(state, TrainState(trained, follow, PartitionSpec()), self.mesh)  # pyright: ignore[reportArgumentType]

    def lies(self, state: TrainState) -> Any:
        """The shardings of a state on the mesh; None on one device."""
        return None if self.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, state)

    def batch(self, batch: Mapping[str, Any]) -> Any:
        """A batch of the data's, split and laid out; each process puts in its own rows."""
        if self.mesh is None:
            return batch
        return sharding.place(*self.parts(batch), self.mesh)

    def shapes(self, batch: Mapping[str, Any]) -> Any:
        """The same as shapes that are laid out, for devices that are not here."""
        arrays, specs = self.parts(batch)
        return sharding.place({n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()}, specs, self.mesh)

    def parts(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, PartitionSpec]]:
        """A batch of the data's, split for the mesh, and the specs."""
        many = np.ndim(batch["tokens"]) == 3  # a leading axis of batches to accumulate
        micro = [{name: x[n] for name, x in batch.items()} for n in range(len(batch["tokens"]))] if many else [batch]
        split = [batch_parts.split_batch(one, self.mesh) for one in micro]
        labels = max(one["labels"].shape[1] for one in split)
        split = [
            one if one["labels"].shape[1] == labels else batch_parts.split_batch(b, self.mesh, labels)
            for one, b in zip(split, micro, strict=True)
        ]
        specs = batch_parts.batch_specs(split[0])
        if not many:
            return split[0], specs
        stacked = {name: np.stack([one[name] for one in split]) for name in specs}
        return stacked, {name: PartitionSpec(None, *spec) for name, spec in specs.items()}

    def own(self, rows: int) -> set[int] | None:
        """The rows of a batch that this process fills; None: all."""
        return None if self.mesh is None or jax.process_count() == 1 else batch_parts.own_rows(rows, self.mesh)

    def step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(state or trained, frozen, batch)` on the data's own batches."""
        return lambda state, frozen, batch: step(state, frozen, self.batch(batch))


def spread_of(config: TrainConfig, options: dict[str, Any]) -> tuple[Pretrained, Spread]:
    """The model on the mesh of the settings, each process reading its own shards, and the mesh. options: of `load`.

    Without `mesh` all devices split the base (fsdp); one device needs none.
    Raises ValueError for a mesh or a batch that does not fit the devices, and what `load` raises.
    """
    if remote(config.output) and not config.dry_run:
        keep_compiled(config.output)
    if jax.device_count() == 1 or config.dry_run:
        if config.mesh and not config.dry_run:
            sharding.make_mesh(config.mesh)
        return load(config.model, weights=not config.dry_run, **options), Spread(attention=config.attention)
    mesh = mesh_for(config)
    shapes = load(config.model, weights=False, **{**options, "quantise": None})
    wanted = paths(sharding.specs(shapes.params, shapes.layouts, mesh))
    base = load(config.model, sharding=lambda path, _: NamedSharding(mesh, wanted[path]), **options)
    return base, Spread(mesh, base.layouts, config.attention)


def mesh_for(config: TrainConfig, devices: Any = None) -> Any:
    """The mesh of the settings over `devices`, or all there are. Raises ValueError where a batch does not split."""
    mesh = sharding.make_mesh(config.mesh or "fsdp=-1", devices)
    parts = batch_parts.batch_shards(mesh)
    if config.batch % parts:
        raise ValueError(f"batch = {config.batch} does not split into {parts} (mesh {config.mesh!r}): use a multiple")
    return mesh
