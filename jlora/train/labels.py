"""Training an encoder's head: cross-entropy over classes, or squared error of a number; and its figures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.train.loss import Sums, label_loss, noisy
from jlora.train.metrics import label_metric


def outputs(model: Any, neftune: float = 0.0) -> Callable[..., jax.Array]:
    """f(params, batch of `LabelSource`, key=None) -> f32 [b, c], what the head says. For `jlora.lift`."""

    def run(params: Any, batch: dict[str, jax.Array], key: Any = None) -> jax.Array:
        with noisy(neftune, key, batch["mask"]):
            return model.apply(
                {"params": params}, batch["tokens"], mask=batch["mask"], token_type_ids=batch["types"]
            ).astype(jnp.float32)

    return run


def label_sums(
    model: Any,
    numbers: bool,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    neftune: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Callable[..., Sums]:
    """f(params, batch, key=None) -> `Sums`: `tokens` and `examples` are rows; the loss is `label_loss` of the class, by
    its weight if there are `class_weights`, or with `numbers` the squared error of the head's one output."""
    head = outputs(model, neftune)

    def sums(params: Any, batch: dict[str, jax.Array], key: Any = None) -> Sums:
        out, weights = head(params, batch, key), batch["weights"]
        if numbers:
            loss, right = (out[:, 0] - batch["labels"]) ** 2, jnp.zeros_like(weights)
        else:
            labels = batch["labels"].astype(jnp.int32)
            loss: Any = label_loss(out, labels, smoothing, z_loss)
            if class_weights is not None:
                loss = loss * jnp.asarray(class_weights, jnp.float32)[labels]
            right = (jnp.argmax(out, axis=-1) == labels).astype(jnp.float32)
        hits, count = jnp.sum(weights * right), jnp.sum(weights)
        return Sums(jnp.sum(weights * loss), count, hits, hits, hits, count)

    return sums


def label_figures(out: np.ndarray, labels: np.ndarray, numbers: bool) -> dict[str, float]:
    """Of the head's outputs f64 [n, c] for labels [n]: {loss, accuracy, f1, matthews}, with `numbers` {loss, pearson,
    spearman}; a correlation of what does not vary is 0."""
    if numbers:
        found = {"loss": float(np.mean((out[:, 0] - labels) ** 2))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy's, of constant input
            found |= {name: label_metric(name, out[:, 0], labels) for name in ("pearson", "spearman")}
        return {name: float(np.nan_to_num(value)) for name, value in found.items()}
    classes, said = labels.astype(int), out.argmax(-1)
    top = out.max(-1)
    log_z = np.log(np.exp(out - top[:, None]).sum(-1)) + top
    found = {"loss": float(np.mean(log_z - out[np.arange(len(out)), classes]))}
    count = out.shape[-1]
    return found | {name: label_metric(name, said, classes, count) for name in ("accuracy", "f1", "matthews")}
