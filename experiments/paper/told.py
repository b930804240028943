"""What `why` found, in words, model by model beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Found = dict[str, dict[str, Any]]
"""Of a model, by weight."""


def told(models: dict[str, tuple[Found, Found]], ranks: tuple[int, int], steps: dict[str, int]) -> str:
    """A paragraph a model {name: (lora's, full fine-tuning's)}, "" unless all of it is there."""
    if not all(lora and full for lora, full in models.values()):
        return ""
    first = (
        "The paper's figures are of GPT-3, these of layer 48 of its 96: the first directions of two ranks share more "
        "than 0.5, and LoRA at r = 4 amplifies by 21.5 what it changes, where W is 16 times what it is in random "
        "directions. Here depth decides whether two runs share a direction, which a mean over layers hides (layers "
        "count from 0). Few steps of small models, at rates that were not searched, are no word on larger ones."
    )
    each = [
        f"{name}, {steps[name]} steps. {' '.join((shared(lora, ranks), amplified(lora, ranks), leaning(full)))}"
        for name, (lora, full) in models.items()
    ]
    return "\n\n".join([first, *each])


def span(values: Sequence[float], form: str) -> str:
    """ "0.1 to 0.2"; one number where both ends are written alike."""
    return " to ".join(dict.fromkeys(format(pick(values), form) for pick in (min, max)))


def shared(lora: Found, ranks: tuple[int, int]) -> str:
    """phi(1, 1) by depth."""
    said = []
    for of in ("ranks", "seeds"):
        phi = {weight: np.asarray(one["A"][f"phi(1, 1) of {of}, by layer"]) for weight, one in lora.items()}
        third = len(next(iter(phi.values()))) // 3
        first, last = (np.mean([one[part] for one in phi.values()]) for part in (slice(third), slice(-third, None)))
        most = max(phi, key=lambda weight: phi[weight].max())
        said.append((f"{first:.2f}", f"{last:.2f}", f"{phi[most].max():.2f} ({most}, layer {phi[most].argmax()})"))
    between, seeds = said
    return (
        f"phi(1, 1) of A between r = {ranks[0]} and {ranks[1]} is {between[0]} in the first third of the layers, "
        f"{between[1]} in the last, {between[2]} at most; between two seeds at r = {ranks[1]} it is {seeds[0]}, "
        f"{seeds[1]} and {seeds[2]}; random {span([1 / one['d'] for one in lora.values()], '.3f')}."
    )


def amplified(lora: Found, ranks: tuple[int, int]) -> str:
    """Table 7's factor; how much of W the change's directions hold, and how much of them W's first ones."""
    (small, large), seven = ranks, [one[f"table 7, r = {ranks[0]}"] for one in lora.values()]
    factors, ratios = [one["factor"] for one in seven], [one["of change"] / one["of random"] for one in seven]
    layers = [x for one in lora.values() for x in one[f"factor by layer, r = {small}"]]
    near = [float(np.mean(one["phi(large, small) of W and AB, by layer"])) for one in lora.values()]
    random = span([large / one["d"] for one in lora.values()], ".2f")
    none = "" if max(factors) > 1 else ", which is no amplification"
    return (
        f"Table 7's factor at r = {small} is {span(factors, '.2f')}{none} ({span(layers, '.2f')} by layer). In the "
        f"change's directions W is {span(ratios, '.2f')} times what it is in random ones, and its first {large} hold "
        f"{span(near, '.2f')} of the change's {small}, {large} random ones {random}."
    )


def leaning(full: Found) -> str:
    """What full fine-tuning changes."""
    eight, many, rank = (
        [float(np.mean(one[key])) for one in full.values()] for key in ("share of 8", "share of 64", "effective rank")
    )
    random = span([one["random"] for one in full.values()], ".0%")
    return (
        f"What full fine-tuning changes has {span(eight, '.0%')} of its square in 8 directions (of a random matrix "
        f"{random}) and {span(many, '.0%')} in 64; its effective rank is {span(rank, '.0f')} of "
        f"{span([one['size'] for one in full.values()], 'd')}."
    )
