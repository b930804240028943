"""Four adapters on one base, one a domain, and how each does on every domain's held-out rows.

    python experiments/serving/domains.py [--output runs] [--steps 80] [--rows 200] [--only tweets] [--json FILE]

Snippets rated by people (Hutto & Gilbert 2014), answered by " positive" or " negative"; settings of
experiments/domains.yaml. An adapter that is there already is not trained again, one that was cut off goes on, and so
does the table. Prints two tables, exact answers and loss (nats a token), a row an adapter and a column a domain; then
`jlora serve --adapters runs/` serves them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.commands.parts import rows_of
from jlora.commands.report import write_json
from jlora.commands.settings import TrainConfig, read_settings, say
from jlora.commands.tasks import Answers
from jlora.commands.train import train
from jlora.data import DOMAINS, split_rows
from jlora.io.adapters import load_adapter

SETTINGS = Path(__file__).parents[1] / "domains.yaml"
Table = dict[str, dict[str, dict[str, float]]]
"""{adapter, "none" for the base: {domain: {exact, first, loss}}}."""


def config_of(domain: str, output: Path, steps: int) -> TrainConfig:
    given: dict[str, Any] = {**read_settings(TrainConfig, SETTINGS), "eval_every": 0, "samples": 2}
    return TrainConfig(**{**given, "data": f"pip:{domain}", "output": str(output / domain), "steps": steps})


def crossed(configs: dict[str, TrainConfig], rows: int, kept: Path, more: dict[str, Path] | None = None) -> Table:
    """The figures of every adapter on `rows` rows a domain that training did not see. What `kept` holds already is not
    judged again, what is judged is added to it at once. more: folders of further adapters by name.
    """
    some = next(iter(configs.values()))
    task = Answers(some)
    base = task.load()
    judge = task.judge(base)
    tests = {}
    for domain, config in configs.items():
        held_out = split_rows(rows_of(config, config.data), config.held_out, config.held_out_seed)[1][:rows]
        tests[domain] = task.testing(task.examples(held_out, base, domain))
    table: Table = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    folders = {name: Path(config.output) / "adapter" for name, config in configs.items()} | (more or {})
    for name in ("none", *folders):
        frozen, lora, _ = load_adapter(base, folders.get(name, Path(some.output) / "adapter"))
        if name == "none":  # the same program, the difference zero
            lora = jax.tree.map(jnp.zeros_like, lora)
        row = table.setdefault(name, {})
        for domain in (domain for domain in tests if domain not in row):
            found = judge(lora, frozen, tests[domain], lambda: False, lambda n: None)
            row[domain] = {key: found[key] for key in ("exact", "first", "loss")}
            say(f"{name} on {domain}: {row[domain]}")
            write_json(kept, table)
    return table


def markdown(table: Table, figure: str, form: str) -> str:
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
    parser.add_argument("--json", type=Path, help="the table's file, which a second run goes on from (domains.json)")
    given = parser.parse_args()
    configs = {domain: config_of(domain, given.output, given.steps) for domain in DOMAINS}
    for domain, config in configs.items():
        if given.only in (None, domain) and not (given.output / domain / "adapter" / "adapter_config.json").exists():
            train(dataclasses.replace(config, resume=(given.output / domain / "checkpoints").exists()))
    if given.only:
        return
    table = crossed(configs, given.rows, given.json or given.output / "domains.json")
    for figure, form in (("exact", "{:.1%}"), ("loss", "{:.3f}")):
        print(markdown(table, figure, form), end="\n\n")


if __name__ == "__main__":
    main()
