"""Four adapters on one base, one a domain, and how each does on every domain's held-out rows.

    python experiments/serving/domains.py [--output runs] [--steps 80] [--rows 200] [--only tweets] [--json FILE]

Snippets rated by people (Hutto & Gilbert 2014), answered by " positive" or " negative"; settings of
experiments/domains.yaml. An adapter that is there already is not trained again, one that was cut off goes on. Prints
two tables, exact answers and loss (nats a token), a row an adapter and a column a domain; then
`jlora serve --adapters runs/` serves them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jlora
from jlora.commands.parts import objective, rows_of, tokens_of
from jlora.commands.settings import TrainConfig, read_settings, say
from jlora.commands.train import train
from jlora.data import DOMAINS, BatchSource, bucket_lengths, split_rows
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.train import evaluate, make_eval_step

SETTINGS = Path(__file__).parents[1] / "domains.yaml"


def config_of(domain: str, output: Path, steps: int) -> TrainConfig:
    given: dict[str, Any] = {**read_settings(TrainConfig, SETTINGS), "eval_every": 0, "samples": 2}
    return TrainConfig(**{**given, "data": f"pip:{domain}", "output": str(output / domain), "steps": steps})


def crossed(configs: dict[str, TrainConfig], rows: int) -> dict[str, dict[str, dict[str, float]]]:
    """{adapter ("none": the base): {domain: {exact, first, loss}}} on `rows` a domain that training did not see."""
    some = next(iter(configs.values()))
    base = load(some.model)
    tests = {}
    for domain, config in configs.items():
        held_out = split_rows(rows_of(config, config.data), config.held_out, config.seed)[1][:rows]
        examples = tokens_of(held_out, base, config, domain)
        tests[domain] = BatchSource(examples, config.batch, bucket_lengths(examples, 2))
    judge = make_eval_step(objective(some, base))
    table: dict[str, Any] = {}
    for name in ("none", *configs):
        _, lora, _ = load_adapter(base, Path(configs.get(name, some).output) / "adapter")
        if name == "none":  # the same program, the difference zero
            lora = jlora.lorafy(base.params, config=jlora_config(some), layouts=base.layouts)[1]
        table[name] = {}
        for domain, testing in tests.items():
            found = evaluate(judge, lora, base.params, (testing[n] for n in range(len(testing))))
            table[name][domain] = {key: float(found[key]) for key in ("exact", "first", "loss")}
            say(f"{name} on {domain}: {table[name][domain]}")
    return table


def jlora_config(config: TrainConfig) -> jlora.LoraConfig:
    return jlora.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))


def markdown(table: dict[str, Any], figure: str, form: str) -> str:
    """A row an adapter, a column a domain; the best of a column in bold."""
    domains = list(next(iter(table.values())))
    pick = min if figure == "loss" else max
    best = {d: pick(row[d][figure] for row in table.values()) for d in domains}
    lines = [f"| {figure} | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    for name, row in table.items():
        cells = [form.format(row[d][figure]) for d in domains]
        cells = [f"**{cell}**" if row[d][figure] == best[d] else cell for cell, d in zip(cells, domains, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows a domain in the table")
    parser.add_argument("--only", choices=list(DOMAINS), help="train this one, print no table")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    configs = {domain: config_of(domain, given.output, given.steps) for domain in DOMAINS}
    for domain, config in configs.items():
        if given.only in (None, domain) and not (given.output / domain / "adapter" / "adapter_config.json").exists():
            train(dataclasses.replace(config, resume=(given.output / domain / "checkpoints").exists()))
    if given.only:
        return
    table = crossed(configs, given.rows)
    for figure, form in (("exact", "{:.1%}"), ("loss", "{:.3f}")):
        print(markdown(table, figure, form), end="\n\n")
    if given.json:
        given.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
