"""`jlora plan`: what a run needs, by formula at once and, with libtpu, by the real TPU compiler with no TPU there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jlora.leaves import is_implicit
from jlora.plan import estimate as by_formula
from jlora.plan.known import GIB, topology
from jlora.plan.setting import METHODS, PlanConfig, Setting, base_of, setting
from jlora.plan.tpu import compile_for
from jlora.plan.wires import wires
from jlora.tree import paths, size

__all__ = ["PlanConfig", "compile_for", "plan", "run"]


def plan(config: PlanConfig) -> dict[str, Any]:
    """One method's figures. Sizes in GB are 10^9 bytes, on one device unless said otherwise.

    Raises ValueError for what is unknown or does not divide, and what `compile_for` raises if `config.compile`.
    """
    where, made = topology(config.topology), setting(config)
    bytes_ = by_formula.estimate(config, made)
    out: dict[str, Any] = {
        "model": config.model,
        "topology": f"{config.topology} ({where.devices} x {where.memory / GIB:.0f} GiB)",
        "method": config.method,
        "mesh": ",".join(f"{name}={n}" for name, n in made.mesh.shape.items() if n > 1) or "one device",
        "by": "formula",
        "parameters": parameters(config, made),
        "adapter_MB_at_16_bits": size(made.state.trained) * 2 / 1e6,
        "GB_a_device": {name: n / 1e9 for name, n in bytes_.items()},
        "fits": bytes_["total"] <= by_formula.room(where),
        "largest_batch": by_formula.largest(config, made, "batch"),
        "largest_seq": by_formula.largest(config, made, "seq"),
        "TFLOP_a_step": by_formula.flops(config, made) / 1e12,
        "GB_received_a_device_and_step": {name: n / 1e9 for name, n in wires(config, made).items()},
    }
    if not where.compiler:
        out["by"] = "formula only: there is no compiler to ask for a GPU"
    if config.compile:
        out["compiled_for"] = by_compiler(config, bytes_["total"])
    return out


def by_compiler(config: PlanConfig, estimated: int) -> dict[str, Any]:
    """The compiler's figures, in GB, and the estimate's ratio to them."""
    told = compile_for(config)
    kinds = ("arguments", "temporaries", "code", "peak")
    return {
        "topology": config.topology,
        "GB_a_device": {name: told[name] / 1e9 for name in kinds},
        "estimate_over_compiler": estimated / told["peak"],
        "estimated_cycles": told["estimated_cycles"],
        "GB_in_collectives": {name: n / 1e9 for name, n in told["collectives"].items()},
        "seconds_to_compile": told["seconds"],
    }


def parameters(config: PlanConfig, made: Setting) -> dict[str, int]:
    """How many, by kind. A trained matrix of the model itself (full fine-tuning) counts under its kind."""
    kinds = {"embeddings": 0, "matrices": 0, "norms and biases": 0}
    for path, leaf in paths(base_of(config, made)[0], is_implicit).items():
        last = path.rsplit("/", 1)[-1]
        kind = "embeddings" if last == "embedding" else "matrices" if last == "kernel" else "norms and biases"
        kinds[kind] += math.prod(leaf.shape)
    total, trained = sum(kinds.values()), size(made.state.trained)
    return {**kinds, "base": total, "trained": trained, "trained_share_1_in": round(total / trained)}


def run(config: PlanConfig) -> dict[str, Any]:
    """`jlora plan`: one plan, or with `compare` {side_by_side: {method: its plan}}.

    Raises ValueError for a method that is not known, and what `plan` raises.
    """
    asked = [name for given in config.compare for name in given.replace(" ", "").split(",") if name]
    wrong = [name for name in asked if name not in METHODS]
    if wrong:
        raise ValueError(f"compare: {wrong[0]!r} is no method: {', '.join(METHODS)}")
    if not asked:
        return plan(config)
    names: Any = dict.fromkeys([config.method, *asked])
    return {"side_by_side": {name: plan(dataclasses.replace(config, method=name, compare=())) for name in names}}
