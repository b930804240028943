"""A long row over `sequence`: exchange tokens for heads (all-to-all), or send keys and values round (a ring)?

    pip install "jlora[tpu]"
    python experiments/scale/rows.py                                         # Llama-3.2-1B, a row over v5e:2x2
    python experiments/scale/rows.py --topology v5e:2x4 --mesh fsdp=2,sequence=4 --batch 2

Compiles the training step of `jlora plan` with each and prints what the TPU compiler says: temporaries, estimated
cycles, bytes on the wires. Nothing runs on a TPU. docs/scale.md holds what was seen.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from jlora.plan.tpu import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import optax

from jlora import batch_parts
from jlora.models.attention import blockwise, splash
from jlora.plan import PlanConfig
from jlora.plan.setting import sums_of
from jlora.plan.tpu import compiled
from jlora.train import answer_sums, make_train_step

WAYS: dict[str, Any] = {"all-to-all, splash": splash, "ring": None, "all-to-all, blockwise": blockwise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", help=f"of {'; '.join(WAYS)}; all of them if none is named")
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--mesh", default="sequence=4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=8192)
    given = vars(parser.parse_args())
    for name in given.pop("ways") or WAYS:

        def step(plan: PlanConfig, run: Any, attention: Any = WAYS[name]) -> Any:
            sums = sums_of(plan, answer_sums(run.model, plan.chunk))
            return make_train_step(batch_parts.over_batch(sums, run.mesh, attention), optax.adamw(1e-4))

        print(json.dumps({"attention": name, **given, **compiled(PlanConfig(**given), step)}), flush=True)


if __name__ == "__main__":
    main()
