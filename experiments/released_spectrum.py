"""The spectrum of the authors' released RoBERTa-base MNLI adapter: how many directions its updates really use.

python experiments/released_spectrum.py roberta_base_lora_mnli.bin [spectrum.png]
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jlora.analysis import spectrum
from jlora.io.loralib import load_loralib
from jlora.models.bert import Bert, BertConfig, hf_tensors

ROBERTA_BASE = BertConfig(50265, 768, 3072, 12, 12, 514, 1, 1e-5, pad_token_id=1, num_labels=3, model_type="roberta")


def main(path: str, plot: str | None = None) -> None:
    model, tensors = Bert(ROBERTA_BASE, head="classify"), hf_tensors(ROBERTA_BASE, head="classify")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    _, lora, _ = load_loralib(path, zeros, tensors, alpha=16)
    attention = lora["encoder"]["layer"]["attention"]["self"]
    found = {name: np.asarray(spectrum(attention[name]["kernel"])) for name in ("query", "value")}
    print("singular values of (alpha/r) A·B, largest first; effective rank = (sum s)^2 / sum s^2")
    for name, values in found.items():
        for layer, row in enumerate(values):
            effective = row.sum() ** 2 / (row**2).sum()
            print(
                f"{name:5} {layer:2d}  "
                + "  ".join(f"{x:6.3f}" for x in row)
                + f"   effective rank {effective:.1f} of 8"
            )
    if plot:
        import matplotlib.figure as mpl

        figure = mpl.Figure(figsize=(8, 3.4), layout="constrained")
        for axes, (name, values) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
            for layer, row in enumerate(values):
                shade = 0.25 + 0.6 * layer / len(values)
                axes.plot(
                    range(1, 9),
                    row,
                    color=(0.1, shade * 0.6, shade),
                    label=f"layer {layer}" if layer in (0, 11) else None,
                )
            axes.set(title=name, xlabel="singular value", yscale="log")
            axes.legend(frameon=False)
        figure.savefig(plot, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
