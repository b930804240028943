"""The paper's latency table (Hu et al., table 1): a forward pass by batch and sequence, for each way to fine-tune.

    python experiments/serving/latency.py [--layers 24] [--grid 1x128 4x64 8x128] [--repeats 10] [--json FILE]

GPT-2 medium's shape (d 1024, 16 heads, 24 layers), random weights, float32: the model itself, with LoRA merged, with
LoRA factored (r 4 on q and v), with adapter layers as Lin et al. (L) and Houlsby et al. (H) of the paper's 11.09M
parameters, and with a prefix of 16 columns in each layer. Programs run in turn; milliseconds are medians, and the
percentages what a program takes more than the model itself, medians over rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from paired import paired, table

import jlora
from jlora.methods import adapter, prefix
from jlora.models.gpt2 import GPT2, GPT2Config

NAMES = {
    "base": "GPT-2 M, fine-tuned",
    "merged": "LoRA merged",
    "factored": "LoRA factored, r 4",
    "adapter L": "adapter L",
    "adapter H": "adapter H",
    "prefix": "prefix, 16 columns",
}


def trees(params: Any, layouts: Any) -> dict[str, Any]:
    """The weights of each program; what is trained is not zero, as after training."""
    nudged = lambda tree: jax.tree.map(lambda x: x + 0.01, tree)
    frozen, lora = jlora.lorafy(params, 4, alpha=32.0, targets=["c_attn"], layouts=layouts)
    lora = nudged(lora)
    made = {"base": params, "merged": jlora.merge(frozen, lora), "factored": jlora.combine(frozen, lora)}
    d = params["wte"]["embedding"].shape[1]
    for name, kind, share in (("adapter L", "lin", 1), ("adapter H", "houlsby", 2)):
        width = round(11.09e6 / 24 / (2 * d) / share)  # 2 d r numbers an adapter, as many in both
        frozen, trained = adapter.make(params, width, kind=kind, layouts=layouts)
        made[name] = jlora.combine(frozen, nudged(trained))
    frozen, trained = prefix.layer(params, 16, layouts=layouts)
    made["prefix"] = jlora.combine(frozen, trained)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--grid", nargs="+", default=["8x128", "4x64", "1x32"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model: Any = GPT2(GPT2Config(n_embd=1024, n_layer=given.layers, n_head=16))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    made = trees(params, {r"h/.*kernel": "sio"})
    plain = lambda tree, tokens: model.apply({"params": tree}, tokens, method="hidden")[:, -1]
    masked = lambda tree, tokens, mask: model.apply({"params": tree}, tokens, mask=mask, method="hidden")
    longer = prefix.with_prefix(masked, 16, 0)
    programs = {name: jax.jit(jlora.lift(plain, strict=True)) for name in made}
    programs["prefix"] = jax.jit(jlora.lift(lambda tree, tokens: longer(tree, tokens, None)[:, -1], strict=True))
    found: dict[str, Any] = {}
    for cell in given.grid:
        batch, length = map(int, cell.split("x"))
        tokens = jnp.ones((batch, length), jnp.int32)
        runs = {name: functools.partial(program, made[name], tokens) for name, program in programs.items()}
        found[cell] = paired(runs, given.repeats)
    print(f"{jax.devices()[0].device_kind}, {given.layers} layers, {given.repeats} rounds\n")
    more = lambda f, key: f"{100 * (1 / f[key] - 1):+.1f} %"
    rows = [
        [NAMES[name], *(f"{found[c][name]['ms']:.0f} ({more(found[c][name], 'ratio')})" for c in given.grid)]
        + [more(found[c][name], "cpu_ratio") for c in given.grid]
        for name in made
    ]
    head = [f"{cell}, ms" for cell in given.grid] + [f"{cell}, by cpu time" for cell in given.grid]
    print(table(["batch x sequence", *head], rows))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
