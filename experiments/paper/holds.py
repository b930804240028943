"""Whether what the paper found holds in the results that are there: agrees, in part, does not agree, or open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.paper import combined, e2e, glue, which
from experiments.paper.chosen import of
from experiments.paper.found import Everything, overfit, planned, steps, watched
from experiments.paper.tables import mean


def faster_holds(results: Everything) -> str:
    found = [full / lora > 1.25 for _, full, lora in steps(results, "seconds")]
    return "open" if not found else "agrees" if all(found) else "does not agree"


def step_memory_holds(results: Everything) -> str:
    found = [full / lora > 2 for _, full, lora in steps(results, "bytes")]
    return "open" if not found else "agrees" if all(found) else "does not agree"


def score(results: Everything, task: str, method: str) -> float:
    """Of experiments/methods.py; nan where it is not there."""
    return results["methods"].get(f"{task}:{method}", {}).get("accuracy", float("nan"))


def glue_holds(results: Everything) -> str:
    """LoRA within a point of full fine-tuning on average."""
    average, full = glue.averages(glue.Config(), results["glue"])
    if full:
        held = "agrees" if average["lora"] - average["full"] > -0.01 else "does not agree"
        return held if full == glue.counted(glue.Config()) else f"{held} so far"
    near = [score(results, task, "lora") - score(results, task, "full") > -0.01 for task in ("sst2", "snippets")]
    return "agrees so far" if all(near) else "in part so far" if any(near) else "open"


def e2e_holds(results: Everything) -> str:
    """LoRA's BLEU above full fine-tuning's."""
    lora, full = (of(results["e2e"], f"e2e/{method}") for method in ("lora", "full"))
    if not (lora and full):
        return "open"
    held = "agrees" if mean(lora)[0] > mean(full)[0] else "does not agree"
    return held if len(lora) == len(full) == e2e.Config().seeds else f"{held} so far"


def preference_holds(results: Everything) -> str:
    """Held-out pairs in order more often than by chance, with every seed."""
    found = of(results["preference"], "dpo")
    return "open" if not found else "agrees" if min(found) > 0.5 else "does not agree"


def combined_holds(results: Everything) -> str:
    """LoRA + PreEmbed above LoRA on a task at least, LoRA + PreLayer below it."""
    if any(of(results["combined"], f"{task}/lora") for task, _ in combined.Config().tasks):
        at = lambda task, method: mean(of(results["combined"], f"{task}/{method}"))[0]
        tasks = [task for task, _ in combined.Config().tasks]
    else:
        at, tasks = (lambda task, method: score(results, task, method)), ["sst2", "snippets"]
    embed = [at(task, "lora+prompt") > at(task, "lora") for task in tasks]
    layer = [at(task, "lora+prefix") < at(task, "lora") for task in tasks]
    if any(np.isnan(at(task, method)) for task in tasks for method in ("lora", "lora+prompt", "lora+prefix")):
        return "open"
    return "agrees" if any(embed) and all(layer) else "in part" if any(embed) or any(layer) else "does not agree"


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
    """At 100 rows LoRA above full fine-tuning, and PreEmbed within five points of chance."""
    lora, full, prompt = (of(results["few"], f"100/{method}") for method in ("lora", "full", "prompt"))
    if not (lora and full and prompt):
        return "open"
    both = [mean(lora)[0] > mean(full)[0], mean(prompt)[0] < 0.55]
    return how_far(both)


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


def how_far(held: Sequence[bool]) -> str:
    return "open" if not held else "agrees" if all(held) else "in part" if any(held) else "does not agree"


def over(results: Everything, kind: str, holds: Callable[[dict[str, Any]], bool]) -> str:
    """Of every model and weight of `why`."""
    held = [
        holds(found)
        for name, weights in results["why"].items()
        if name.endswith(f"/{kind}")
        for weight, found in weights.items()
        if weight != "seconds"
    ]
    return how_far(held)


def overlap_holds(results: Everything) -> str:
    """phi(1, all) of A above a half."""
    return over(results, "lora", lambda found: np.mean(found["A"]["phi(1, all) of ranks, by layer"]) > 0.5)


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
    found = planned(results, "states, GB")
    return "open" if not found else "agrees, by plan" if found[0] / found[1] > 3 else "does not agree"


def checkpoint_holds(results: Everything) -> str:
    found = planned(results, "checkpoint, MB at 16 bits")
    return "open" if not found else "agrees, by plan" if 9000 < found[0] / found[1] < 11000 else "does not agree"
