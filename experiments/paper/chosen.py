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
FURTHER = "one further"
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
    """Cells NAME/rate R on the first of `tests`, NAME/one further where the best stands at an end of `rates`, then
    NAME/seed N at the best rate on the second.

    like: the name whose search decides instead; its cells come before.
    """

    def search(rate: float, done: Results) -> dict[str, Any]:
        return fit(rate, SEARCH, tests[0])

    def further(done: Results) -> dict[str, Any]:
        rate = beyond(rates, best(name, done))
        return {"rate": rate, **(fit(rate, SEARCH, tests[0]) if rate else {})}

    def final(seed: int, done: Results) -> dict[str, Any]:
        rate = best(like or name, done)
        return {**fit(rate, seed, tests[1]), "rate": rate}

    tried = [Cell(f"{name}/rate {rate:g}", functools.partial(search, rate)) for rate in rates]
    tried = [] if like else [*tried, Cell(f"{name}/{FURTHER}", further)]
    return tried + [Cell(f"{name}/seed {seed}", functools.partial(final, seed)) for seed in range(seeds)]


def best(name: str, done: Results) -> float:
    """The rate of the best score of NAME's search; the first tried of equals."""
    start = f"{name}/rate "
    scores = {float(key.removeprefix(start)): held["score"] for key, held in done.items() if key.startswith(start)}
    further = done.get(f"{name}/{FURTHER}", {})
    if "score" in further:
        scores[further["rate"]] = further["score"]
    return max(scores, key=lambda rate: scores[rate])


def beyond(rates: Sequence[float], rate: float) -> float | None:
    """One more step of the grid where `rate` is its last or first, to one digit; None within, or for a grid of one."""
    if len(rates) < 2 or rate not in (rates[0], rates[-1]):
        return None
    step = rates[-1] / rates[-2] if rate == rates[-1] else rates[0] / rates[1]
    return float(f"{rate * step:.0e}")


def of(done: Results, name: str, key: str = "score") -> list[float]:
    """A figure of every seed that is there."""
    return [held[key] for full, held in done.items() if full.startswith(f"{name}/seed ")]


def stages(methods: Sequence[str]) -> list[list[str]]:
    """Those that decide before the rest."""
    return [[method for method in methods if (method in DECIDE) is decides] for decides in (True, False)]


def seeds_of(config: Any, method: str) -> int:
    """`config.seeds` of methods that decide, `config.others` of the rest."""
    return config.seeds if method in DECIDE else config.others
