"""A QLoRA step compiled from shapes alone: the codes are its arguments, and no stack of weights is written out."""

import json
import re

import jax

import jlora
from jlora.batch_parts import batch_specs
from jlora.plan import PlanConfig
from jlora.plan.setting import setting
from jlora.sharding import place
from jlora.tree import nbytes


def test_a_qlora_plan_compiles(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    plan = PlanConfig(str(tmp_path), "v5e:1x1", "qlora", batch=1, seq=16, chunk=16, rank=4)
    run = setting(plan, jax.devices()[:1])
    linear = run.frozen["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(linear, jlora.QuantisedLeaf) and linear.shape == (3, 256, 384)
    parts = ((run.state, run.state_specs), (run.frozen, run.frozen_specs), (run.batch, batch_specs(run.batch)))
    program = run.step.lower(*(place(tree, specs, run.mesh) for tree, specs in parts)).compile()
    arguments = program.memory_analysis().argument_size_in_bytes
    trees = nbytes(run.frozen) + nbytes(run.state) + nbytes(run.batch)
    assert abs(arguments - trees) < 0.01 * trees
    assert not re.search(r"(f32|bf16)\[3,(256,384|384,256)\]", program.as_text())
