"""Whether what the paper found holds in the results that are there, by `gaps.how_far`: a method is above another where
the interval of their difference says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.paper import combined, dimension, e2e, few, glue, nlg, shots, which, why
from experiments.paper.chosen import DECIDE, of, seeds_of
from experiments.paper.found import Everything, overfit, planned, steps, watched
from experiments.paper.gaps import Part, above, below, gap, how_far
from experiments.paper.tables import mean


def faster_holds(results: Everything) -> str:
    found = [full / lora > 1.25 for _, full, lora in steps(results, "seconds")]
    return "open" if not found else "agrees" if all(found) else "does not agree"


def step_memory_holds(results: Everything) -> str:
    """Two thirds less; and half."""
    times = [full / lora for _, full, lora in steps(results, "bytes")]
    return how_far([found > least for found in times for least in (2, 3)])


def score(results: Everything, task: str, method: str) -> float:
    """Of experiments/methods.py; nan where it is not there."""
    return results["methods"].get(f"{task}:{method}", {}).get("accuracy", float("nan"))


def glue_holds(results: Everything) -> str:
    """LoRA no more than a point below full fine-tuning on average."""
    config, done = glue.Config(), results["glue"]
    tasks = glue.whole(config, done, "lora", "full")
    if tasks:
        lora, full = (glue.by_seed(done, tasks, method) for method in ("lora", "full"))
        return how_far([above(lora, full, by=-0.01)], tasks == glue.counted(config))
    near = [score(results, task, "lora") - score(results, task, "full") > -0.01 for task in ("sst2", "snippets")]
    return how_far(near, whole=False) if any(near) else "open"


def e2e_holds(results: Everything) -> str:
    return set_holds(results, "e2e")


def sets_hold(results: Everything) -> str:
    return set_holds(results, "webnlg", "dart")


def set_holds(results: Everything, *names: str) -> str:
    """LoRA above full fine-tuning in every figure, and in BLEU above every other method that is there, on each of the
    sets `names`."""
    config, parts, whole = e2e.Config(), [], True
    for name in names:
        found = lambda method, figure="bleu", name=name: of(results["e2e"], f"{name}/{method}", figure)
        whole &= all(len(found(method)) >= seeds_of(config, method) for method in e2e.NAMES)
        if found("lora"):
            if found("full"):
                parts += [above(found("lora", figure), found("full", figure)) for figure in nlg.NAMES]
            others = [method for method in e2e.NAMES if method not in DECIDE and found(method)]
            parts += [above(found("lora"), found(method)) for method in others]
    return how_far(parts, whole)


def others_hold(results: Everything) -> str:
    """BitFit and each adapter below LoRA on average, and without the task that tells most against it."""
    config, done, parts, whole = glue.Config(), results["glue"], [], True
    for method in ("bitfit", "houlsby", "pfeiffer"):
        tasks = glue.whole(config, done, "lora", method)
        if tasks:
            for some in (tasks, glue.but_worst(done, tasks, method)[1]):
                parts += [below(*(glue.by_seed(done, some, name) for name in (method, "lora")))] if some else []
        whole &= tasks == glue.counted(config)
    return how_far(parts, whole)


def ranks_hold(results: Everything) -> str:
    """q at rank 1 below rank 8; all four at rank 1 no more than a point below."""
    at = lambda weights, rank: of(results["which"], f"{weights} r={rank}")
    if not all(at(weights, rank) for weights in ("q", "qkvo") for rank in (1, 8)):
        return "open"
    return how_far([below(at("q", 1), at("q", 8)), above(at("qkvo", 1), at("qkvo", 8), by=-0.01)])


def dimension_holds(results: Everything) -> str:
    """The least D on the grid below a hundredth of the parameters; the larger model's share no larger, which a step of
    the grid must not undo."""
    config = dimension.Config()
    found = list(dimension.reached(config, results["dimension"]).values())
    if len(found) < len(config.models):
        return "open"
    first, *_, last = [one.share or 1.0 for one in sorted(found, key=lambda one: one.parameters)]
    step = max(b / a for a, b in itertools.pairwise(config.dimensions))
    larger = True if last * step <= first else False if last >= first * step else None
    return f"{how_far([first < 0.01, last < 0.01, larger])}, one seed"


def preference_holds(results: Everything) -> str:
    """Held-out pairs in order more often than by chance, with every seed."""
    found = of(results["preference"], "dpo")
    return "open" if not found else "agrees" if min(found) > 0.5 else "does not agree"


def combined_holds(results: Everything) -> str:
    """LoRA + PreEmbed above LoRA and PreEmbed on one task and not on the other, LoRA + PreLayer below LoRA."""
    at = lambda task, method: of(results["combined"], f"{task}/{method}")
    tasks = [task for task, _ in combined.Config().tasks]
    if not all(at(task, method) for task in tasks for method in combined.NAMES):
        return "open"
    embed = [both_of(*(above(at(task, "lora+prompt"), at(task, one)) for one in ("lora", "prompt"))) for task in tasks]
    layer = [below(at(task, "lora+prefix"), at(task, "lora")) for task in tasks]
    return how_far([any_of(*embed), None if None in embed else not all(embed), *layer])


def shots_hold(results: Everything) -> str:
    """Of two words, LoRA right more often than with any number of examples in the prompt; and by ten points."""
    config, done = shots.Config(), results["shots"]
    told = [done[f"{count} examples"]["of two"] for count in config.shots if f"{count} examples" in done]
    lora = of(done, "lora", "of two")
    ahead = mean(lora)[0] - max(told) if told and lora else None
    return "open" if ahead is None else how_far([ahead > 0, ahead > 0.1], len(told) == len(config.shots))


def which_holds(results: Everything) -> str:
    """q and v at a lower rank above the best single weight, and all four too."""
    found = {case: of(results["which"], f"{case[0]} r={case[1]}") for case in which.BUDGET}
    if not all(found.values()):
        return "open"
    single = max((scores for (weights, _), scores in found.items() if len(weights) == 1), key=lambda s: mean(s)[0])
    return how_far([above(scores, single) for (weights, _), scores in found.items() if weights in ("qv", "qkvo")])


def rank_holds(results: Everything) -> str:
    """q and v at rank 1 no more than a point below rank 64."""
    one, many = (of(results["which"], f"qv r={rank}") for rank in (1, 64))
    return how_far([above(one, many, by=-0.01)]) if one and many else "open"


def few_holds(results: Everything) -> str:
    """At 100 rows LoRA above full fine-tuning and PreEmbed within five points of chance; later LoRA and full within one
    of each other."""
    at = lambda rows, method: of(results["few"], f"{rows}/{method}")
    if not (at(100, "lora") and at(100, "full") and at(100, "prompt")):
        return "open"
    held: list[Part] = [above(at(100, "lora"), at(100, "full")), mean(at(100, "prompt"))[0] < 0.55]
    for rows in few.Config().rows[1:]:
        if at(rows, "lora") and at(rows, "full"):
            difference, half = gap(at(rows, "lora"), at(rows, "full"))
            held.append(True if abs(difference) < 0.01 else None if abs(difference) <= half else False)
    return how_far(held)


def forgetting_holds(results: Everything) -> str:
    """By full fine-tuning the general perplexity grows more, and the loss on held-out rows lies further above that on
    the rows it saw."""
    grown, apart = {}, {}
    for method in ("full", "lora"):
        runs = watched(results, method)
        if not runs:
            return "open"
        curves = [run["general text, perplexity"] for run in runs]
        grown[method] = np.mean([curve[-1] / curve[0] for curve in curves])
        apart[method] = overfit(runs)
    return how_far([figure["full"] > figure["lora"] for figure in (grown, apart)])


def over(results: Everything, kind: str, holds: Callable[[dict[str, Any]], bool]) -> str:
    """Of every model and weight of `why`."""
    held = [
        holds(found)
        for name in results["why"]
        if name.endswith(f"/{kind}")
        for found in why.by_weight(results["why"], name).values()
    ]
    return how_far(held)


def overlap_holds(results: Everything) -> str:
    """phi(1, 1) of A above a half between ranks; between seeds above ten times the random."""
    phi = lambda found, key: np.mean(found["A"][f"phi(1, 1) of {key}, by layer"])
    return both(
        results, "lora", lambda found: phi(found, "ranks") > 0.5, lambda found: phi(found, "seeds") > 10 / found["d"]
    )


def both_of(first: Part, second: Part) -> Part:
    """And, of what may be unknown."""
    return False if False in (first, second) else None if None in (first, second) else True


def any_of(*parts: Part) -> Part:
    """Or, of what may be unknown."""
    return True if True in parts else None if None in parts else False


def both(results: Everything, kind: str, *holds: Callable[[dict[str, Any]], bool]) -> str:
    """Agrees where all of `holds` do, in part where one does."""
    found = {over(results, kind, one) for one in holds}
    return next(iter(found)) if len(found) == 1 else "in part"


def amplified_holds(results: Everything) -> str:
    """Amplified at all; and W in the change's directions well above random ones (twice), below a tenth of its own."""
    seven = lambda found: found["table 7, r = 8"]
    return both(
        results,
        "lora",
        lambda found: seven(found)["factor"] > 1,
        lambda found: 2 * seven(found)["of random"] < seven(found)["of change"] < 0.1 * seven(found)["of W"],
    )


def low_rank_holds(results: Everything) -> str:
    """Half of the squared change in 8 directions; and nine tenths."""
    share = lambda found: np.mean(found["share of 8"])
    return both(results, "full", lambda found: share(found) > 0.5, lambda found: share(found) > 0.9)


def switching_holds(results: Everything) -> str:
    """By either way at least ten times faster than to read the model anew."""
    held = results["cost"].get("switching")
    ways = ("put two factors where two were", "merged: subtract one, add the other")
    return how_far([held["read the whole model"] > 10 * held[way] for way in ways] if held else [])


def memory_holds(results: Everything) -> str:
    """What lies there between steps, and the whole of a step: three times less."""
    found = [planned(results, key) for key in ("states, GB", "step, GB")]
    held = how_far([pair[0] / pair[1] >= 3 for pair in found if pair])
    return held if held == "open" else f"{held}, by plan"


def checkpoint_holds(results: Everything) -> str:
    found = planned(results, "checkpoint, MB at 16 bits")
    return "open" if not found else "agrees, by plan" if 9000 < found[0] / found[1] < 11000 else "does not agree"
