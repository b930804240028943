"""Whether what the paper found holds in the results that are there: agrees, in part, does not agree, or open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.paper import combined, dimension, e2e, few, glue, shots, which, why
from experiments.paper.chosen import of, seeds_of
from experiments.paper.found import Everything, overfit, planned, steps, watched
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
    """LoRA within a point of full fine-tuning on average."""
    average, full = glue.averages(glue.Config(), results["glue"])
    if full:
        return how_far([average["lora"] - average["full"] > -0.01], full == glue.counted(glue.Config()))
    near = [score(results, task, "lora") - score(results, task, "full") > -0.01 for task in ("sst2", "snippets")]
    return how_far(near, whole=False) if any(near) else "open"


def e2e_holds(results: Everything) -> str:
    return set_holds(results, "e2e")


def sets_hold(results: Everything) -> str:
    return set_holds(results, "webnlg", "dart")


def set_holds(results: Everything, *names: str) -> str:
    """LoRA's BLEU above every other method's that is there, on each of the sets `names`."""
    config, above, whole = e2e.Config(), [], True
    for name in names:
        found = {method: of(results["e2e"], f"{name}/{method}") for method in e2e.NAMES}
        whole &= all(len(scores) >= seeds_of(config, method) for method, scores in found.items())
        lora = found.pop("lora")
        above += [mean(lora)[0] > mean(other)[0] for other in found.values() if lora and other]
    return how_far(above, whole)


def others_hold(results: Everything) -> str:
    """BitFit and each adapter below LoRA on average."""
    config, done, below, whole = glue.Config(), results["glue"], [], True
    for method in ("bitfit", "houlsby", "pfeiffer"):
        tasks = glue.whole(config, done, "lora", method)
        if tasks:
            below.append(glue.middle(done, tasks, method) < glue.middle(done, tasks, "lora"))
        whole &= tasks == glue.counted(config)
    return how_far(below, whole)


def ranks_hold(results: Everything) -> str:
    """q at rank 1 more than half a point below rank 8; all four at rank 1 within one."""
    at = lambda weights, rank: of(results["which"], f"{weights} r={rank}")
    if not all(at(weights, rank) for weights in ("q", "qkvo") for rank in (1, 8)):
        return "open"
    less = {weights: mean(at(weights, 8))[0] - mean(at(weights, 1))[0] for weights in ("q", "qkvo")}
    return how_far([less["q"] > 0.005, less["qkvo"] < 0.01])


def dimension_holds(results: Everything) -> str:
    """The least D on the grid below a hundredth of the parameters; the larger model's share no larger."""
    config = dimension.Config()
    found = list(dimension.reached(config, results["dimension"]).values())
    if len(found) < len(config.models):
        return "open"
    shares = [one.share or 1.0 for one in sorted(found, key=lambda one: one.parameters)]
    return how_far([*(share < 0.01 for share in shares), shares[-1] <= shares[0]])


def preference_holds(results: Everything) -> str:
    """Held-out pairs in order more often than by chance, with every seed."""
    found = of(results["preference"], "dpo")
    return "open" if not found else "agrees" if min(found) > 0.5 else "does not agree"


def combined_holds(results: Everything) -> str:
    """LoRA + PreEmbed above LoRA and PreEmbed on one task and not on the other, LoRA + PreLayer below LoRA."""
    if any(of(results["combined"], f"{task}/lora") for task, _ in combined.Config().tasks):
        at = lambda task, method: mean(of(results["combined"], f"{task}/{method}"))[0]
        tasks = [task for task, _ in combined.Config().tasks]
    else:
        at, tasks = (lambda task, method: score(results, task, method)), ["sst2", "snippets"]
    if any(np.isnan(at(task, method)) for task in tasks for method in combined.NAMES):
        return "open"
    embed = [at(task, "lora+prompt") > max(at(task, "lora"), at(task, "prompt")) for task in tasks]
    layer = [at(task, "lora+prefix") < at(task, "lora") for task in tasks]
    return how_far([any(embed), not all(embed), all(layer)])


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
    single = max(mean(scores)[0] for (weights, _), scores in found.items() if len(weights) == 1)
    both = [mean(scores)[0] > single for (weights, _), scores in found.items() if weights in ("qv", "qkvo")]
    return how_far(both)


def rank_holds(results: Everything) -> str:
    """q and v at rank 1 within a point of rank 64."""
    one, many = (of(results["which"], f"qv r={rank}") for rank in (1, 64))
    return ("agrees" if mean(one)[0] > mean(many)[0] - 0.01 else "does not agree") if one and many else "open"


def few_holds(results: Everything) -> str:
    """At 100 rows LoRA above full fine-tuning and PreEmbed within five points of chance; later LoRA and full within one
    of each other."""
    at = lambda rows, method: of(results["few"], f"{rows}/{method}")
    if not (at(100, "lora") and at(100, "full") and at(100, "prompt")):
        return "open"
    held = [mean(at(100, "lora"))[0] > mean(at(100, "full"))[0], mean(at(100, "prompt"))[0] < 0.55]
    for rows in few.Config().rows[1:]:
        if at(rows, "lora") and at(rows, "full"):
            held.append(abs(mean(at(rows, "lora"))[0] - mean(at(rows, "full"))[0]) < 0.01)
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


def how_far(held: Sequence[bool], whole: bool = True) -> str:
    """Of the parts of a claim. whole: whether all that they weigh has run."""
    if not held:
        return "open"
    said = "agrees" if all(held) else "in part" if any(held) else "does not agree"
    return said if whole else f"{said} so far"


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


def memory_holds(results: Everything) -> str:
    """What lies there between steps, and the whole of a step: three times less."""
    found = [planned(results, key) for key in ("states, GB", "step, GB")]
    held = how_far([pair[0] / pair[1] >= 3 for pair in found if pair])
    return held if held == "open" else f"{held}, by plan"


def checkpoint_holds(results: Everything) -> str:
    found = planned(results, "checkpoint, MB at 16 bits")
    return "open" if not found else "agrees, by plan" if 9000 < found[0] / found[1] < 11000 else "does not agree"
