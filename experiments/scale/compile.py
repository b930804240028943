"""Compile training steps for TPUs that are not here, and put the estimate beside the compiler's figures.

    pip install "jlora[tpu]"
    python experiments/scale/compile.py                      # every case: an hour on two cores
    python experiments/scale/compile.py 8b-lora 8b-full      # some of them
    python experiments/scale/compile.py --list

Nothing runs on a TPU and no weight is made. Lines of JSON go to --out, the table to stdout; a case that --out holds
is not compiled again, so a sweep that was stopped goes on. docs/scale.md holds what was seen.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from jlora.plan import PlanConfig, compile_for, plan
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
    "8b-qlora-one-v5p": PlanConfig(topology="v5p:1", method="qlora", batch=1, seq=196608),
    "8b-qlora-one-v6e": PlanConfig(topology="v6e:1", method="qlora", batch=1, seq=56832),
    "gpt3-lora": PlanConfig(model="gpt3-175b", topology="v5p:2x2x2", batch=8, targets=C_ATTN, rank=4),
    "gpt3-full": PlanConfig(model="gpt3-175b", topology="v5p:2x4x4", batch=32, method="full"),
    "gpt3-lora-64": PlanConfig(model="gpt3-175b", topology="v5p:4x4x4", batch=64, targets=C_ATTN, rank=4),
    "gpt3-full-64": PlanConfig(model="gpt3-175b", topology="v5p:4x4x4", batch=64, method="full"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all of them if none is named")
    parser.add_argument("--out", default="docs/scale.jsonl", help="lines of JSON are added here")
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
    out = Path(given.out)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    held = {entry["case"]: entry for entry in map(json.loads, lines)}
    print("| case | topology | arguments | temporaries | peak | fits | estimate | estimate / compiler | on the wires |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in chosen:
        if name not in held and not given.no_compile:
            held[name] = {"case": name, "libtpu": metadata.version("libtpu"), **asked(CASES[name])}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(held[name]) + "\n")
        print(row(name, CASES[name], held.get(name, {})), flush=True)


def asked(case: PlanConfig) -> dict[str, Any]:
    """The compiler's figures, or why it refused."""
    try:
        return compile_for(case)
    except ValueError as error:
        return {"refused": str(error)}


def row(name: str, case: PlanConfig, told: dict[str, Any]) -> str:
    """One line of the table; GB (10^9 bytes) a chip."""
    figures, memory = plan(case), topology(case.topology).memory
    estimate = figures["GB_a_device"]["total"]
    if "refused" in told:
        return f"| {name} | {case.topology} | {told['refused']} | | | no | {estimate:.2f} | | |"
    if not told:
        return f"| {name} | {case.topology} | | | | {figures['fits']} | {estimate:.2f} | | |"
    sizes = {kind: told[kind] / 1e9 for kind in ("arguments", "temporaries", "peak")}
    fits = "yes" if told["peak"] < memory else f"no ({memory / GIB:.0f} GiB)"
    moved = ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in told["collectives"].items() if n >= 5e6)
    return (
        f"| {name} | {case.topology} | {sizes['arguments']:.2f} | {sizes['temporaries']:.2f} | {sizes['peak']:.2f} "
        f"| {fits} | {estimate:.2f} | {estimate / sizes['peak']:.2f} | {moved} |"
    )


if __name__ == "__main__":
    main()
