"""Compile training steps for TPUs that are not here, and put the estimate beside the compiler's figures.

    pip install "jlora[tpu]"
    python experiments/scale/compile.py                      # every case: an hour on two cores
    python experiments/scale/compile.py 8b-lora 8b-full      # some of them
    python experiments/scale/compile.py --list

Nothing runs on a TPU and no weight is made. Lines of JSON go to --out, the table to stdout. docs/scale.md holds what
was seen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jlora.plan import PlanConfig, plan
from jlora.plan.known import GIB, topology

QV = ("q_proj", "v_proj")
C_ATTN = ("c_attn",)  # GPT's q, k and v are one matrix: r=4 on it has as many parameters as r=4 on q and on v

CASES = {
    "8b-lora": PlanConfig(),
    "8b-merged": PlanConfig(method="merged"),
    "8b-full": PlanConfig(method="full"),
    "8b-lora-1k": PlanConfig(seq=1024),
    "8b-lora-2rows": PlanConfig(batch=16),
    "8b-lora-4k": PlanConfig(topology="v5e:4x4", batch=16, seq=4096),
    "8b-lora-tensor": PlanConfig(mesh="fsdp=4,tensor=2"),
    "8b-lora-v6e-qv": PlanConfig(topology="v6e:2x4", targets=QV, rank=8),
    "8b-lora-one-v5p": PlanConfig(topology="v5p:1", batch=1),
    "1b-lora": PlanConfig(model="llama-3.2-1b"),
    "1b-lora-data": PlanConfig(model="llama-3.2-1b", mesh="data=-1"),
    "135m-lora": PlanConfig(model="smollm2-135m", topology="v5e:2x2", batch=32),
    "gpt2-lora": PlanConfig(model="gpt2", topology="v5e:2x2", batch=16, seq=1024, targets=C_ATTN, rank=4),
    "70b-lora-v5p": PlanConfig(model="llama-3-70b", topology="v5p:2x2x4", batch=16),
    "70b-lora-v6e": PlanConfig(model="llama-3-70b", topology="v6e:4x4", batch=16),
    "70b-qlora-v5e": PlanConfig(model="llama-3-70b", topology="v5e:2x4", method="qlora"),
    "8b-qlora-one-v5p": PlanConfig(topology="v5p:1", method="qlora", batch=1, seq=131072),
    "8b-qlora-one-v6e": PlanConfig(topology="v6e:1", method="qlora", batch=1, seq=32768),
    "gpt3-lora": PlanConfig(model="gpt3-175b", topology="v5p:4x4x4", batch=64, targets=C_ATTN, rank=4),
    "gpt3-full": PlanConfig(model="gpt3-175b", topology="v5p:4x4x4", batch=64, method="full"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all of them if none is named")
    parser.add_argument("--out", default="scale.jsonl", help="lines of JSON are added here")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--no-compile", action="store_true", help="by formula only: no libtpu is needed")
    given = parser.parse_args()
    unknown = set(given.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --list prints them")
    chosen = given.cases or list(CASES)
    if given.list:
        print("\n".join(f"{name}: {CASES[name]}" for name in chosen))
        return
    print("| case | topology | arguments | temporaries | peak | fits | estimate | estimate / compiler | on the wires |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in chosen:
        print(row(name, CASES[name], Path(given.out), not given.no_compile), flush=True)


def row(name: str, case: PlanConfig, out: Path, compiling: bool) -> str:
    """One line of the table; GB (10^9 bytes) a chip."""
    where = topology(case.topology)
    figures = plan(case)
    estimate = figures["GB_a_device"]["total"]
    told: dict = {}
    if compiling:
        import dataclasses

        try:
            told = plan(dataclasses.replace(case, compile=True))["compiled_for"]
        except ValueError as error:
            told = {"refused": str(error)}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"case": name, "plan": figures, "compiled_for": told}) + "\n")
    if "refused" in told:
        return f"| {name} | {case.topology} | {told['refused']} | | | no | {estimate:.2f} | | |"
    if not told:
        return f"| {name} | {case.topology} | | | | {figures['fits']} | {estimate:.2f} | | |"
    sizes = told["GB_a_device"]
    fits = "yes" if sizes["peak"] * 1e9 < where.chip.memory else f"no ({where.chip.memory / GIB:.0f} GiB)"
    moved = ", ".join(f"{kind} {n:.2f}" for kind, n in told["GB_in_collectives"].items() if n >= 0.005)
    return (
        f"| {name} | {case.topology} | {sizes['arguments']:.2f} | {sizes['temporaries']:.2f} | {sizes['peak']:.2f} "
        f"| {fits} | {estimate:.2f} | {told['estimate_over_compiler']:.2f} | {moved} |"
    )


if __name__ == "__main__":
    main()
