"""Why a low rank is enough: figures 3, 4 and 6 to 8, table 7, and the spectrum of what full fine-tuning changes.

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
    """Subspaces of three adapters, and table 7."""
    small, large = config.ranks
    few, many, again = (
        dict(np.load(place(subject, config, rank, seed))) for rank, seed in ((small, 0), (large, 0), (large, 1))
    )
    leaves = jlora.tree.paths(work().base.params)
    weights = {path.split("/")[-2]: leaf for path, leaf in leaves.items() if path.endswith("/kernel")}
    out: dict[str, Any] = {}
    for name in sorted({key.partition("/")[0] for key in few}):
        held = {rank: (adapter[f"{name}/a"], adapter[f"{name}/b"]) for rank, adapter in ((small, few), (large, many))}
        held[0] = (again[f"{name}/a"], again[f"{name}/b"])
        products = {
            key: [spectra.svd_of_product(a, b) for a, b in zip(*pair, strict=True)] for key, pair in held.items()
        }
        out[name] = {}
        for what in ("A", "AB"):
            of_small, of_large, of_again = (
                [spectra.basis(a) for a in held[key][0]] if what == "A" else [u for u, _, _ in products[key]]
                for key in (small, large, 0)
            )
            between = [spectra.overlaps(f, m) for f, m in zip(of_small, of_large, strict=True)]
            seeds = [spectra.overlaps(m, a) for m, a in zip(of_large, of_again, strict=True)]
            out[name][what] = {
                "ranks": rounded(between[subject.layer], 3),
                "seeds": rounded(seeds[subject.layer][:small, :small], 3),
                "phi(1, all) of ranks, by layer": rounded([phi[0, -1] for phi in between]),
                "phi(1, 1) of ranks, by layer": rounded([phi[0, 0] for phi in between]),
                "phi(1, 1) of seeds, by layer": rounded([phi[0, 0] for phi in seeds]),
            }
        d = held[large][0].shape[1]
        chance = spectra.overlaps(*(spectra.basis(spectra.gaussian((d, large), seed)) for seed in (0, 1)))
        out[name] |= {"random": rounded(chance[:small], 3), "d": d}
        ws = [(w, spectra.svd(w)) for w in np.asarray(weights[name])]
        for rank in (small, large):
            each = [spectra.amplified(*w, change, rank) for w, change in zip(ws, products[rank], strict=True)]
            out[name][f"table 7, r = {rank}"] = {key: rounded(np.mean([one[key] for one in each])) for key in each[0]}
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
    shown = Shown(text=told(config, done))
    small, large = config.ranks
    line = lambda values: f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    similar, seven, full = [], [], []
    for name, _ in config.subjects:
        for weight, found in by_weight(done, f"{name}/lora").items():
            for what in ("A", "AB"):
                first, whole, seeds = (
                    line(found[what][f"phi({of}, by layer"])
                    for of in ("1, 1) of ranks", "1, all) of ranks", "1, 1) of seeds")
                )
                random = f"{1 / found['d']:.3f}"
                similar.append([name, weight, what, first, seeds, random, whole, f"{large / found['d']:.3f}"])
            for rank in config.ranks:
                seven.append([name, weight, f"LoRA r = {rank}", *seven_of(found[f"table 7, r = {rank}"])])
        for weight, found in by_weight(done, f"{name}/full").items():
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
    shown.figures.extend(heat_maps(config, done))
    shown.figures.extend(curves(config, done))
    return shown


def told(config: Config, done: Results) -> str:
    """What holds at this size, in figures of every model and weight; "" until all of them are there."""
    held, loras = ([by_weight(done, f"{name}/{kind}") for name, _ in config.subjects] for kind in ("full", "lora"))
    if not (all(held) and all(loras)):
        return ""
    small, large = config.ranks
    full, lora = ([one for found in many for one in found.values()] for many in (held, loras))
    span = lambda values, form: " to ".join(dict.fromkeys(format(pick(values), form) for pick in (min, max)))
    mean = lambda many, key: [float(np.mean(one[key])) for one in many]
    phi = lambda of: [float(np.mean(one["A"][f"phi(1, 1) of {of}, by layer"])) for one in lora]
    factors = [[one[f"table 7, r = {small}"]["factor"] for one in found.values()] for found in loras]
    amplified = ", ".join(
        f"{span(found, '.2g')} ({name})" for found, (name, _) in zip(factors, config.subjects, strict=True)
    )
    return (
        "What full fine-tuning changes leans on few directions: the first 8 hold "
        f"{span(mean(full, 'share of 8'), '.0%')} of its square (of a random matrix "
        f"{span([one['random'] for one in full], '.0%')}), the first 64 {span(mean(full, 'share of 64'), '.0%')}. It "
        f"is not of rank 8: its effective rank is {span(mean(full, 'effective rank'), '.0f')}. What LoRA learns at "
        f"ranks {small} and {large} shares {span(phi('ranks'), '.2f')} of its first direction, with two seeds "
        f"{span(phi('seeds'), '.2f')}, where random directions share {span([1 / one['d'] for one in lora], '.3f')} and "
        f"the paper's GPT-3 more than 0.5. Table 7's factor at r = {small} is {amplified}; in GPT-3 21.5. A few "
        "hundred steps of small models are little to learn from: this is what is seen here, no word on larger models."
    )


def seven_of(found: dict[str, float]) -> list[str]:
    keys = ("of change", "of W", "of random", "W", "change", "factor")
    return [f"{found[key]:.3g}" for key in keys]


def heat_maps(config: Config, done: Results) -> list[Figure]:
    """Figures 3 (ranks) and 4 (seeds), with random directions beside."""
    out, (small, large) = [], config.ranks
    for name, subject in config.subjects:
        held = by_weight(done, f"{name}/lora")
        if not held:
            continue
        maps = (("A", "ranks"), ("AB", "ranks"), ("AB", "seeds"), ("random", ""))
        figure, axes = canvas(len(held), len(maps), (2.7, 2.3))
        most = max(np.max(found[what][key] if key else found[what]) for found in held.values() for what, key in maps)
        for row, (weight, found) in zip(axes, held.items(), strict=True):
            for ax, (what, key) in zip(row, maps, strict=True):
                phi = np.asarray(found[what][key] if key else found[what])
                edges = (0.5, phi.shape[1] + 0.5, 0.5, phi.shape[0] + 0.5)
                image = ax.imshow(phi, vmin=0, vmax=most, aspect="auto", origin="lower", extent=edges)
                of = f"r = {small} and {large}" if key == "ranks" else "two seeds" if key else ""
                ax.set(title=f"{weight}, {what} {of}".rstrip(), xlabel="j", ylabel="i")
            figure.colorbar(image, ax=row[-1], label="phi(i, j)")
        caption = f"{name}, layer {subject.layer}: overlap of the first i and j input directions"
        out.append(Figure(f"overlap-{TAG[subject.model]}", caption, figure))
    return out


def curves(config: Config, done: Results) -> list[Figure]:
    """The spectrum of W' - W."""
    held = {name: by_weight(done, f"{name}/full") for name, _ in config.subjects if f"{name}/full" in done}
    if not held:
        return []
    figure, axes = canvas(1, len(held), (4.2, 3))
    for ax, (name, found) in zip(axes[0], held.items(), strict=True):
        for weight, one in found.items():
            ax.plot(range(1, len(one["spectrum"]) + 1), one["spectrum"], label=weight)
        ax.set(title=name, xlabel="singular value of W' - W", ylabel="over the first", xscale="log", yscale="log")
        ax.legend(frameon=False)
    return [Figure("full-spectrum", "Singular values of what full fine-tuning changes in one layer", figure)]


EXPERIMENT = Experiment("why", "Figures 3 to 8, table 7: why a low rank is enough", Config(), SMALL, cells, show)
