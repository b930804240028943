"""What a plan is about: the run's trees as shapes, placed on a mesh. No weight is made."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora import batch_parts, sharding
from jlora.generate import most_tokens, writes
from jlora.io.load import layouts_of
from jlora.methods.named import MethodConfig, make
from jlora.models import family
from jlora.models.attention import named
from jlora.plan.known import config_of, topology
from jlora.train import TrainState, answer_sums, make_train_step

METHODS = ("lora", "merged", "full", "qlora")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Say what a run needs before it is paid for: parameters, bytes a device, FLOPs, whether it fits.

    `model`: a known name, or a folder with config.json; `topology`: v5e:2x4, v5p:2x2x1, h100:8 ...
    """

    model: str = "llama-3-8b"
    topology: str = "v5e:2x4"
    method: Literal["lora", "merged", "full", "qlora"] = "lora"
    """merged: LoRA that writes W + A·B out each step; qlora: the base's matrices in NF4."""
    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    batch: int = 8
    """Examples a step, over all devices."""
    seq: int = 2048
    """Tokens an example; all of them carry the loss."""
    mesh: str = "fsdp=-1"
    dtype: str = "bfloat16"
    """Of the base and the computation; full fine-tuning trains in it."""
    remat: Literal["full", "offload", "dots", "none"] = "full"
    attention: Literal["auto", "plain", "blockwise", "splash", "cudnn"] = "auto"
    """plain holds all scores; the others a block at a time. auto: splash on TPU, cudnn on GPU."""
    chunk: int = 512
    """Labels whose logits are alive at once."""
    compile: bool = False
    """Ask the TPU compiler, if libtpu is installed: nothing runs, no TPU is needed."""
    compare: tuple[str, ...] = ()
    """Other methods to put beside this one: full,merged,qlora."""
    parts: str = ""
    """Of fused weights, which equal parts of the outputs are adapted, as `jlora train` takes it: x-x of c_attn."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element of the computation."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def again(self) -> int:
        """How many times a layer is computed again for the backward pass."""
        return 1 if self.remat in ("full", "offload") else 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Trees of `ShapeDtypeStruct`s with the specs of each, and the functions over them."""

    config: Any
    model: Any
    mesh: Any
    frozen: Any
    frozen_specs: Any
    state: TrainState
    state_specs: TrainState
    batch: dict[str, Any]
    step: Any


def setting(plan: PlanConfig, devices: Any = None) -> Setting:
    """The run that `plan` describes. devices: of the topology, to compile for; without them the mesh is abstract.

    Raises ValueError for unknown names, impossible sizes, an encoder, rows that do not divide or are longer than the
    model has positions, targets that match nothing, or parts that these do not have.
    """
    for name in ("batch", "seq", "chunk", "rank"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{name} = {getattr(plan, name)}: it must be 1 or more")
    where = topology(plan.topology)
    mesh = mesh_of(plan.mesh, where.devices) if devices is None else sharding.make_mesh(plan.mesh, devices)
    config = config_of(plan.model)
    kind, dtype = family(config.model_type), jnp.dtype(plan.dtype)
    remat = {"full": True, "none": False}.get(plan.remat, plan.remat)
    model = kind.model(config, dtype=dtype, param_dtype=dtype, scan_layers=True, remat=remat)
    if not writes(model):
        raise ValueError(f"{plan.model} is an encoder: only decoders are planned")
    most = most_tokens(model)
    if most is not None and plan.seq > most:
        raise ValueError(f"{plan.model} has {most} positions, and seq is {plan.seq}: {most} at most")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    layouts = layouts_of(kind.hf_tensors(config))
    if plan.method == "full":
        frozen, trained = jax.tree.map(lambda _: None, params), params
    else:
        if plan.method == "qlora":
            params = jlora.quantise(params, "nf4", layouts=layouts)
        how = MethodConfig(rank=plan.rank, targets=plan.targets, parts=plan.parts)
        frozen, trained = jax.eval_shape(lambda p: make(p, how, layouts=layouts), params)
    tx = optax.adamw(1e-4)
    state = jax.eval_shape(lambda t: TrainState(t, tx.init(t), jnp.zeros((), jnp.int32)), trained)
    trained_specs = sharding.specs(trained, layouts, mesh)
    opt_specs = sharding.like(state.opt_state, trained, trained_specs)
    count: Any = jax.sharding.PartitionSpec()
    state_specs = TrainState(trained_specs, opt_specs, count)
    sums = sums_of(plan, answer_sums(model, plan.chunk))
    spread = batch_parts.over_batch(sums, mesh, named(plan.attention, "tpu" if where.compiler else "gpu"))
    lies = None if devices is None else jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), state_specs)
    return Setting(
        config,
        model,
        mesh,
        frozen,
        sharding.specs(frozen, layouts, mesh),
        state,
        state_specs,
        batch_of(plan, mesh),
        make_train_step(spread, tx, lies=lies),
    )


def base_of(plan: PlanConfig, run: Setting) -> tuple[Any, Any]:
    """The model's own weights, and their specs."""
    full = plan.method == "full"
    return (run.state.trained, run.state_specs.trained) if full else (run.frozen, run.frozen_specs)


def sums_of(plan: PlanConfig, sums: Any) -> Any:
    """f(trained, frozen, batch, key) of the method."""
    lifted = jlora.lift(sums, strict=True)

    def lora(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return lifted(jlora.combine(frozen, trained), batch)

    def merged(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return sums(jlora.merge(frozen, trained), batch)

    def full(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return sums(trained, batch)

    return {"lora": lora, "qlora": lora, "merged": merged, "full": full}[plan.method]


def mesh_of(text: str, count: int) -> Any:
    """The mesh of one line with its sizes and no devices. Raises as `sharding.mesh_sizes` does."""
    shape = tuple(sharding.mesh_sizes(text, count).values())
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.AbstractMesh(shape, sharding.AXES, axis_types=kinds)


def batch_of(plan: PlanConfig, mesh: Any) -> dict[str, Any]:
    """A `split_batch` as shapes, every token labelled."""
    n = batch_parts.batch_shards(mesh)
    if plan.batch % n:
        raise ValueError(f"a batch of {plan.batch} does not split into {n} (mesh {plan.mesh!r}): use a multiple of {n}")
    parts = mesh.shape["sequence"]
    if plan.seq % parts:
        raise ValueError(
            f"rows of {plan.seq} tokens do not split into {parts} (mesh {plan.mesh!r}): use a multiple of {parts}"
        )
    rows = plan.batch // n
    kinds = dict.fromkeys(("positions", "labels", "example"), jnp.int32) | {"weights": jnp.float32}
    return {
        "tokens": jax.ShapeDtypeStruct((n, rows, plan.seq), jnp.int32),
        "mask": jax.ShapeDtypeStruct((n, rows, plan.seq), jnp.bool_),
        **{name: jax.ShapeDtypeStruct((n, rows * plan.seq), kind) for name, kind in kinds.items()},
    }
