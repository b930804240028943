"""Learning rates chosen on rows held out of train, then one fit a seed on the rows that count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.paper.cells import Cell, Results

Fit = Callable[[float, int, str], dict[str, Any]]
"""fit(rate, seed, test set) -> figures with "score", more is better."""
SEARCH = 100
"""The seed of the search: none of those that count."""
DECIDE = ("lora", "full")
"""Methods between which the claims decide: they go first, and have as many seeds as that takes."""


def tuned(
    name: str,
    rates: Sequence[float],
    seeds: int,
    fit: Fit,
    tests: tuple[str, str] = ("split", "dev"),
    like: str = "",
) -> list[Cell]:
    """Cells NAME/rate R on the first of `tests`, then NAME/seed N at the best rate on the second.

    like: the name whose search decides instead; its cells come before.
    """

    def search(rate: float, done: Results) -> dict[str, Any]:
        return fit(rate, SEARCH, tests[0])

    def final(seed: int, done: Results) -> dict[str, Any]:
        rate = best(like or name, rates, done)
        return {**fit(rate, seed, tests[1]), "rate": rate}

    tried = [Cell(f"{name}/rate {rate:g}", functools.partial(search, rate)) for rate in rates if not like]
    return tried + [Cell(f"{name}/seed {seed}", functools.partial(final, seed)) for seed in range(seeds)]


def best(name: str, rates: Sequence[float], done: Results) -> float:
    return max(rates, key=lambda rate: done[f"{name}/rate {rate:g}"]["score"])


def of(done: Results, name: str, key: str = "score") -> list[float]:
    """A figure of every seed that is there."""
    return [held[key] for full, held in done.items() if full.startswith(f"{name}/seed ")]


def stages(methods: Sequence[str]) -> list[list[str]]:
    """Those that decide before the rest."""
    return [[method for method in methods if (method in DECIDE) is decides] for decides in (True, False)]


def seeds_of(config: Any, method: str) -> int:
    """`config.seeds` of methods that decide, `config.others` of the rest."""
    return config.seeds if method in DECIDE else config.others
