"""Whether one method is above another, of a few seeds each, and what that makes of a claim."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Part = bool | None
"""Of a claim: it holds, it does not, or these seeds cannot tell."""


def gap(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """(difference of the means, half width of its 95 % interval) by Student's t with one variance for both, so that one
    seed may stand against several; nan for fewer than three in all."""
    from scipy import stats

    x, y = (np.asarray(list(values), float) for values in (ours, theirs))
    free = len(x) + len(y) - 2
    if not (len(x) and len(y)) or free < 1:
        return (float(x.mean() - y.mean()) if len(x) and len(y) else float("nan")), float("nan")
    spread = np.sqrt((((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum()) / free)
    half = stats.t.ppf(0.975, free) * spread * np.sqrt(1 / len(x) + 1 / len(y))
    return float(x.mean() - y.mean()), float(half)


def above(ours: Sequence[float], theirs: Sequence[float], by: float = 0.0) -> Part:
    """Whether ours is above theirs by more than `by`; None where the interval holds `by`, or there is none."""
    difference, half = gap(ours, theirs)
    return None if np.isnan(half) or abs(difference - by) <= half else difference > by


def below(ours: Sequence[float], theirs: Sequence[float]) -> Part:
    return above(theirs, ours)


def how_far(held: Sequence[Part], whole: bool = True) -> str:
    """The verdict on a claim of its parts. whole: whether all that they weigh has run."""
    told = [one for one in held if one is not None]
    if not held:
        return "open"
    if not told:
        said = "cannot be told apart"
    elif all(told):
        said = "agrees" if len(told) == len(held) else "agrees as far as it can be told"
    else:
        said = "in part" if any(told) else "does not agree"
    return said if whole else f"{said} so far"
