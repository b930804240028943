"""BitFit: only the biases train (Ben Zaken et al. 2021, arXiv 2106.10199). Or only the LayerNorms.

Departure: none; a model without biases (Llama, Mistral) is refused.
"""

from __future__ import annotations

import re
from typing import Any

from jlora.methods.plant import leaves_of, whole
from jlora.targets import BIAS, known
from jlora.tree import names_in, slashed

NORM = re.compile(r"norm|(^|/)ln_?\w*(/|$)", re.I)
NORM_WEIGHT = BIAS | {"scale", "weight", "gamma", "g"}


def make(params: Any, *, layouts: Any = None, key: Any = None) -> tuple[Any, Any]:
    """(frozen, trained): every bias trains, those of LayerNorms too.

    layouts: what `jlora.layouts` returns tells biases by their use; without it, by their names.
    """

    def is_bias(path: str) -> bool:
        kind = getattr(known(path, layouts), "kind", None)
        return kind == "bias" if kind else names_in(path)[-1] in BIAS

    return only(params, is_bias, "bias")


def norms(params: Any, *, key: Any = None) -> tuple[Any, Any]:
    """(frozen, trained): only the scales and biases of LayerNorms (or RMSNorms) train."""

    def is_norm(path: str) -> bool:
        return NORM.search(slashed(path)) is not None and names_in(path)[-1] in NORM_WEIGHT

    return only(params, is_norm, "norm")


def only(params: Any, wanted: Any, what: str) -> tuple[Any, Any]:
    leaves = leaves_of(params)
    chosen = [path for path in leaves if wanted(path)]
    if not chosen:
        raise ValueError(f"no {what} among the {len(leaves)} leaves ({', '.join(list(leaves)[:4])}, ...)")
    return whole(params, chosen)
