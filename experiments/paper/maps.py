"""Figures of `why`: overlaps of subspaces as heat maps, layer by layer with random directions beside, and spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.paper import spectra
from experiments.paper.tables import Figure, canvas

Found = dict[str, dict[str, Any]]
"""Of a model, by weight."""


def overlaps(models: dict[str, Found], ranks: tuple[int, int], tags: dict[str, str]) -> list[Figure]:
    """Figures 3 and 6 (two ranks), 4 and 7 (two seeds), 8 (with W, a figure a model) of the models that are there."""
    models = {name: held for name, held in models.items() if held}
    if not models:
        return []
    (small, large), rows = ranks, []
    for name, held in models.items():
        rows += [(f"{name.partition(',')[0]}\n{weight}", one) for weight, one in held.items()]
    few, many = spectra.kept(small), spectra.kept(large)
    between = [(label, one["layers"], [*one["ranks"], one["random"][: len(few)]]) for label, one in rows]
    seeds = [(label, one["layers"], [*one["seeds"], one["random"]]) for label, one in rows]
    out = [
        Figure(
            "overlap-ranks",
            f"Figures 3 and 6: phi(i, j) of A's first i directions at r = {small} and first j at r = {large}",
            drawn(between, few, many, (f"i, r = {small}", f"j, r = {large}")),
        ),
        Figure(
            "overlap-seeds",
            f"Figures 4 and 7: phi(i, j) of A's first i and j directions at r = {large} by two seeds",
            drawn(seeds, many, many, ("i, one seed", "j, another")),
        ),
    ]
    for name, held in models.items():
        own = []
        for weight, one in held.items():
            for rank, key in ((small, "own, small"), (large, "own, large")):
                random = [line[: len(spectra.kept(rank))] for line in one["own, random"]]
                own.append((f"{weight}\nr = {rank}", one["layers"], [*one[key], random]))
        caption = f"Figure 8, {name}: phi(i, j) of W's first i directions and the change's (A·B) first j"
        first = spectra.doubled(2 ** (len(own[0][2][0]) - 1))
        out.append(Figure(f"overlap-own-{tags[name]}", caption, drawn(own, first, many, ("i, of W", "j, of A·B"))))
    return out


Row = tuple[str, list[int], list[list[list[float]]]]
"""A label, the layers, their maps with the random one last."""


def drawn(rows: Sequence[Row], i: Sequence[int], j: Sequence[int], axes_of: tuple[str, str]) -> Any:
    """A row a weight, a column a layer, the last one random; one scale of colours. A step of an axis is one of the `i`
    and `j` that are kept."""
    figure, axes = canvas(len(rows), len(rows[0][2]), (2.2, 1.75))
    most, image = max(np.max(phi) for _, _, panels in rows for phi in panels), None
    for n, (line, (label, layers, panels)) in enumerate(zip(axes, rows, strict=True)):
        for ax, title, phi in zip(line, [*(f"layer {layer}" for layer in layers), "random"], panels, strict=True):
            image = ax.imshow(phi, vmin=0, vmax=most, aspect="auto", origin="lower")
            ax.set_title(title, fontsize=10)
            for axis, steps in ((ax.xaxis, j[: len(phi[0])]), (ax.yaxis, i[: len(phi)])):
                marked = [k for k in (1, 4, 8, 16, 32, 64, 128) if k in steps and (k != 8 or len(steps) <= 8)]
                axis.set_ticks([steps.index(k) for k in marked], [str(k) for k in marked], fontsize=8)
            if n == len(rows) - 1:
                ax.set_xlabel(axes_of[1])
        line[0].set_ylabel(f"{label}\n{axes_of[0]}")
    figure.colorbar(image, ax=axes, label="phi(i, j)", aspect=40, pad=0.01)
    return figure


def spectrum(models: dict[str, Found], layers: dict[str, int]) -> list[Figure]:
    """Singular values of W' - W in one layer a model."""
    models = {name: held for name, held in models.items() if held}
    if not models:
        return []
    figure, axes = canvas(1, len(models), (4.2, 3))
    for ax, (name, found) in zip(axes[0], models.items(), strict=True):
        for weight, one in found.items():
            ax.plot(range(1, len(one["spectrum"]) + 1), one["spectrum"], label=weight)
        ax.set(
            title=f"{name}, layer {layers[name]}",
            xlabel="singular value of W' - W",
            ylabel="over the first",
            xscale="log",
            yscale="log",
        )
        ax.legend(frameon=False)
    return [Figure("full-spectrum", "Singular values of what full fine-tuning changes in one layer", figure)]
