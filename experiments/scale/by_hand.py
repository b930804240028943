"""Does lifting cost anything? Llama-3-8B with LoRA written out by hand, and by qwix, compiled beside the lifted model.

    pip install "jlora[tpu]" qwix
    python experiments/scale/by_hand.py                       # ten minutes on two cores; nothing runs on a TPU
    python experiments/scale/by_hand.py --topology v5p:2x2x1
    python experiments/scale/by_hand.py --model llama-3.2-1b --batch 8 --beside hand

All have the project's loss, optimiser, sharding and attention; by hand every product is `x·W + s·(x·A)·B` in plain
jax.numpy, a scan over layers with rematerialisation; qwix's provider changes the project's own Flax model. The
compiler's estimated cycles and bytes are printed, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from jlora.plan.tpu import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora import batch_parts
from jlora.models.attention import Sight, attend, named
from jlora.models.rope import rotate
from jlora.plan import PlanConfig
from jlora.plan.tpu import compiled
from jlora.train import Sums, answer_sums, chunked_sums, make_train_step


def written_out(plan: PlanConfig, run: Any) -> Any:
    """The training step of `plan`, LoRA by hand."""
    c, eps = run.config, run.config.rms_norm_eps
    held = NamedSharding(run.mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, "sequence", None))
    keep = lambda x: jax.lax.with_sharding_constraint(x, held)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * scale).astype(x.dtype)

    def linear(x: jax.Array, w: Any, f: Any) -> jax.Array:
        factors = f["kernel"]
        a, b = factors.lora_a.astype(x.dtype), factors.lora_b.astype(x.dtype)
        return x @ w["kernel"] + factors.scaling * ((x @ a) @ b)

    def sums(trained: Any, frozen: Any, batch: Any, key: Any) -> Sums:
        tokens, mask = batch["tokens"], batch["mask"]
        places = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        sight = Sight(jnp.ones_like(tokens), mask.astype(jnp.int32), jnp.zeros((), jnp.int32))

        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            w, f = weights
            y, at, ft = norm(x, w["input_layernorm"]["scale"]), w["self_attn"], f["self_attn"]
            q, k, v = (
                linear(y, at[n], ft[n]).reshape(*x.shape[:2], -1, c.head_dim) for n in ("q_proj", "k_proj", "v_proj")
            )
            q, k = (rotate(z, places, c.frequencies()) for z in (q, k))
            out = attend(q, k, v, sight).reshape(*x.shape[:2], -1)
            x = keep(x + keep(linear(out, at["o_proj"], ft["o_proj"])))
            y, m, fm = norm(x, w["post_attention_layernorm"]["scale"]), w["mlp"], f["mlp"]
            y = jax.nn.silu(linear(y, m["gate_proj"], fm["gate_proj"])) * linear(y, m["up_proj"], fm["up_proj"])
            return keep(x + keep(linear(y, m["down_proj"], fm["down_proj"]))), None

        x = keep(frozen["embed_tokens"]["embedding"][tokens])
        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, (frozen["layers"], trained["layers"]))
        x = norm(x, frozen["norm"]["scale"])
        picked = x.reshape(-1, x.shape[-1])[batch["positions"]]
        if c.tie_word_embeddings:
            head = lambda h: h @ frozen["embed_tokens"]["embedding"].T
        else:
            head = lambda h: h @ frozen["lm_head"]["kernel"]
        nll, right = chunked_sums(head, picked, batch["labels"], plan.chunk)
        weights = batch["weights"]
        loss, count = (nll * weights).sum(), weights.sum()
        return Sums(loss, count, (right * weights).sum(), count, count, count)

    return step_of(plan, run, sums)


def step_of(plan: PlanConfig, run: Any, sums: Any) -> Any:
    return make_train_step(batch_parts.over_batch(sums, run.mesh, named(plan.attention, "tpu")), optax.adamw(1e-4))


def by_qwix(plan: PlanConfig, run: Any) -> Any:
    """The training step of `plan` with qwix's provider on the same model: our factors under its names."""
    import qwix

    names = sorted({path.split("/")[-3] for path in jlora.tree.paths(run.state.trained)})
    scaling = jax.tree.leaves(run.state.trained, is_leaf=lambda x: isinstance(x, jlora.LoraFactors))[0].scaling
    provider = qwix.LoraProvider(module_path=f".*({'|'.join(names)})", rank=plan.rank, alpha=scaling * plan.rank)
    model = qwix.apply_lora_to_model(run.model, provider, methods=("__call__", "hidden", "head"))
    each = answer_sums(model, plan.chunk)

    def with_factors(frozen: Any, trained: Any) -> Any:
        if not isinstance(frozen, dict):
            return frozen
        out = {name: with_factors(one, trained[name]) for name, one in frozen.items()}
        for name, one in trained.items():
            if isinstance(one, jlora.LoraFactors):
                factors = {"a": one.lora_a, "b": one.lora_b}  # in the weight's dtype: qwix's product would be float32
                out |= {f"{name}_lora_{which}": x.astype(frozen[name].dtype) for which, x in factors.items()}
        return out

    return step_of(plan, run, lambda trained, frozen, batch, key: each(with_factors(frozen, trained), batch))


STEPS = {"hand": written_out, "qwix": by_qwix}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--beside", nargs="+", choices=STEPS, default=list(STEPS))
    given = vars(parser.parse_args())
    beside, plan = given.pop("beside"), PlanConfig(**given)
    lifted = compiled(plan)
    print(json.dumps({"step": "lifted", **lifted}), flush=True)
    for step in beside:
        other = compiled(plan, STEPS[step])
        print(json.dumps({"step": step, **other}), flush=True)
        for name in ("estimated_cycles", "temporaries", "peak"):
            print(f"{name}: {step} / lifted = {other[name] / lifted[name]:.3f}", flush=True)


if __name__ == "__main__":
    main()
