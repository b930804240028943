"""Where methods attach in models with the Hub's module names, and a weight's bias beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jlora.targets import GROUPS, in_group, is_matrix, known, letters_of
from jlora.tree import STACK, Targets, names_in, near, select, slashed

POINTS = {
    "key": r"(^|/)(k_proj|key|key_proj|k_lin)/[^/]+$",
    "value": r"(^|/)(v_proj|value|value_proj|v_lin)/[^/]+$",
    "fused": r"(^|/)(c_attn|query_key_value|qkv_proj|Wqkv)/[^/]+$",
    "attention out": r"(^|/)(o_proj|out_proj|out_lin|attention/output/dense|attn/c_proj)/[^/]+$",
    "mlp in": r"(^|/)(up_proj|gate_proj|intermediate/dense|mlp/c_fc|fc1|lin1)/[^/]+$",
    "mlp out": r"(^|/)(down_proj|(?<!attention/)output/dense|mlp/c_proj|fc2|lin2)/[^/]+$",
}
"""Regexes over the paths of weights: Llama, Qwen, GPT-2, BERT, RoBERTa, DeBERTa, DistilBERT, OPT."""


def find(points: Targets, leaves: Mapping[str, Any], layouts: Any, what: str) -> list[str]:
    """The paths of the matrices that `points` means: keys of `POINTS`, groups of `targets.GROUPS`, names, regexes or a
    predicate, in tree order.

    Raises ValueError for one that matches no matrix.
    """
    if callable(points):
        return select(points, leaves, what)
    matrices = [path for path, leaf in leaves.items() if is_matrix(path, leaf, layouts)]
    chosen: set[str] = set()
    for point in [points] if isinstance(points, str) else points:
        if point in POINTS:
            found = {path for path in matrices if re.search(POINTS[point], slashed(path))}
        elif point in GROUPS:
            found = set(in_group(point, matrices, layouts))
        else:
            found = set(select(point, leaves, what)).intersection(matrices)
        if not found:
            raise ValueError(f"{what}: {point!r} matches no matrix{near(point, leaves)}")
        chosen |= found
    return [path for path in leaves if path in chosen]


def bias_of(path: str, leaves: Mapping[str, Any]) -> str | None:
    """The path of the bias added after the product with this weight: `bias` or `b` beside it, or None."""
    stem = path.removesuffix(names_in(path)[-1])
    return next((stem + name for name in ("bias", "b") if stem + name in leaves), None)


def layout_of(path: str, leaf: Any, layouts: Any) -> str:
    """As `targets.letters_of`, a weight [s, i, o] of a scanned model being told from its name `kernel`."""
    rows = len(leaf.shape) == 3 and path.endswith("/kernel") and STACK.search(slashed(path))
    return "sio" if rows and known(path, layouts) is None else letters_of(path, leaf, layouts)
