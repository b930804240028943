"""The authors' released RoBERTa-base MNLI adapter: spectra and subspaces of its factors, without its base.

python -m experiments.all released
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.counts import CONFIGS
from experiments.paper import spectra
from experiments.paper.cells import Cell, Experiment, Results
from experiments.paper.tables import Figure, Shown, Table, canvas
from experiments.paper.works import folder
from jlora.analysis import matrices, spectrum
from jlora.io.loralib import load_loralib
from jlora.models.bert import Bert, hf_tensors


@dataclasses.dataclass(frozen=True)
class Config:
    """alpha as the release has it."""

    file: str = "roberta_base_lora_mnli.bin"
    alpha: float = 16.0


def read(config: Config) -> dict[str, Any]:
    """{"query": factors, "value": factors}, stacked over 12 layers; the base stands as shapes of zeros."""
    roberta = dataclasses.replace(CONFIGS["RoBERTa-base"], num_labels=3)
    model, tensors = Bert(roberta, head="classify"), hf_tensors(roberta, head="classify")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    path = folder("loralib_roberta_base_mnli") / config.file
    attention = load_loralib(str(path), zeros, tensors, alpha=config.alpha)[1]["encoder"]["layer"]["attention"]["self"]
    return {name: attention[name]["kernel"] for name in ("query", "value")}


def cells(config: Config) -> list[Cell]:
    return [Cell("factors", functools.partial(factors, config))]


def factors(config: Config, done: Results) -> dict[str, Any]:
    """Per weight and layer: singular values, effective rank, norm; overlaps of A between the two and with random."""
    held, out = read(config), {}
    sides = {name: [spectra.basis(a) for a in matrices(entry)[0]] for name, entry in held.items()}
    d, r = sides["query"][0].shape
    random = [spectra.basis(spectra.gaussian((d, r), seed)) for seed in range(40)]
    for name, entry in held.items():
        values = np.asarray(spectrum(entry), np.float64)
        out[name] = {
            "singular values": np.round(values, 3).tolist(),
            "effective rank": [round(spectra.effective_rank(s), 2) for s in values],
            "share of 1": [round(spectra.energy(s, 1), 3) for s in values],
        }
    phi = lambda u, v: spectra.overlaps(u, v)[[0, 0, -1], [0, -1, -1]]
    out["query against value"] = np.round([phi(q, v) for q, v in zip(*sides.values(), strict=True)], 4).tolist()
    out["random"] = np.round(np.mean([phi(random[n], random[n + 1]) for n in range(39)], axis=0), 4).tolist()
    return out


def show(config: Config, done: Results) -> Shown:
    if "factors" not in done:
        return Shown()
    held = done["factors"]
    rows = []
    for layer in range(len(held["query"]["effective rank"])):
        cells = []
        for name in ("query", "value"):
            first, last = held[name]["singular values"][layer][0], held[name]["singular values"][layer][-1]
            cells += [f"{first:.2f} to {last:.2f}", f"{held[name]['effective rank'][layer]:.1f}"]
        rows.append([str(layer), *cells, *(f"{x:.3f}" for x in held["query against value"][layer])])
    rows.append(["random", "", "", "", "", *(f"{x:.3f}" for x in held["random"])])
    head = ["layer", "query: values", "effective rank", "value: values", "effective rank"]
    head += ["phi(1, 1) of q and v", "phi(1, 8)", "phi(8, 8)"]
    note = (
        "Singular values of (alpha/r) A·B, effective rank (sum s)²/sum s² of 8, and how far query and value read the "
        "same directions of A."
    )
    from matplotlib import colormaps

    figure, axes = canvas(1, 2, (4.2, 3))
    for ax, name in zip(axes[0], ("query", "value"), strict=True):
        table = np.array(held[name]["singular values"])
        colours = colormaps["viridis"](np.linspace(0, 0.93, len(table)))
        for layer, values in enumerate(table):
            ax.plot(range(1, len(values) + 1), values, color=colours[layer], label=str(layer))
        ax.set(title=name, xlabel="direction", ylabel="singular value of (alpha/r) A·B", yscale="log", ylim=(0.01, 20))
    figure.legend(*axes[0][0].get_legend_handles_labels(), title="layer", loc="outside right center", frameon=False)
    return Shown(
        [Table(head, rows, note)], [Figure("released-spectrum", "The released adapter, layer by layer", figure)]
    )


EXPERIMENT = Experiment("released", "The authors' released RoBERTa-base MNLI adapter", Config(), Config(), cells, show)
