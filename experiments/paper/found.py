"""What was found, of the results that are there, in a line a claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.paper import combined, e2e, few, glue, nlg, shots, which, why
from experiments.paper.chosen import DECIDE, of
from experiments.paper.gaps import gap
from experiments.paper.tables import cell, mean

Everything = dict[str, dict[str, Any]]
"""Results of every experiment by its name; {} where there are none."""


def glue_here(results: Everything) -> str:
    done, config = results["glue"], glue.Config()
    full = glue.whole(config, done, "lora", "full")
    if full:
        scores = {name: glue.by_seed(done, full, name) for name in ("lora", "full")}
        best = {name: f"{100 * mean(values)[0]:.1f}" for name, values in scores.items()}
        size = int(of(done, f"{full[0]}/lora", "trained")[0])
        each = {task: gap(of(done, f"{task}/lora"), of(done, f"{task}/full")) for task in full}
        worst = min(each, key=lambda task: each[task][0])
        rest = [task for task in full if task != worst]
        without = gap(*(glue.by_seed(done, rest, name) for name in ("lora", "full")))
        return (
            f"MiniLM: LoRA {best['lora']}, full {best['full']} ({apart(scores['lora'], scores['full'])} at "
            f"{size / 22_713_216:.1%} of the parameters): "
            f"{', '.join(f'{task} {wide(*found)}' for task, found in each.items())}; without {worst} {wide(*without)}"
        )
    both = [t for t, _ in config.tasks if of(done, f"{t}/lora") and of(done, f"{t}/full")]
    said = [f"{t}: LoRA {cell(of(done, f'{t}/lora'))}, full {cell(of(done, f'{t}/full'))}" for t in both]
    if said:
        return f"MiniLM, part of the table: {'; '.join(said)}"
    return once(results, {"lora": "LoRA", "full": "full", "houlsby": "adapter H", "prefix": "prefix-layer"})


def apart(ours: list[float], theirs: list[float]) -> str:
    return wide(*gap(ours, theirs))


def wide(difference: float, half: float) -> str:
    """A difference and its interval, x 100."""
    return f"{100 * difference:+.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")


def glue_others(results: Everything) -> str:
    """Every method's average over the tasks that it and LoRA have in full."""
    said, done = [], results["glue"]
    for method in dict(glue.Config().rates):
        tasks = glue.whole(glue.Config(), done, "lora", method)
        if tasks and method not in DECIDE:
            theirs, ours = (glue.by_seed(done, tasks, name) for name in (method, "lora"))
            on = "" if tasks == glue.counted(glue.Config()) else f" on {', '.join(tasks)}"
            worst, rest = glue.but_worst(done, tasks, method)
            left = apart(*(glue.by_seed(done, rest, name) for name in (method, "lora")))
            said.append(
                f"{glue.NAMES[method]} {100 * mean(theirs)[0]:.1f} to LoRA's {100 * mean(ours)[0]:.1f} "
                f"({apart(theirs, ours)}; without {worst} {left}){on}"
            )
    searched = " and ".join(glue.Config().search)
    rest = f". Theirs is one seed, their rates (but DoRA's) searched on {searched} alone, so a gap may be the rate's"
    return (
        "; ".join(said) + rest if said else once(results, {"lora": "LoRA", "bitfit": "BitFit", "houlsby": "adapter H"})
    )


def few_here(results: Everything) -> str:
    said = []
    for rows in few.Config().rows:
        found = {few.NAMES[m]: of(results["few"], f"{rows}/{m}") for m in few.NAMES}
        parts = [f"{name} {cell(values)}" for name, values in found.items() if values]
        said += [f"{rows:,} rows: {', '.join(parts)}"] if parts else []
    return f"MiniLM on SST-2, first rows of train alike for every seed: {'; '.join(said)}" if said else ""


def combined_here(results: Everything) -> str:
    said = []
    for task, _ in combined.Config().tasks:
        found = {name: of(results["combined"], f"{task}/{m}") for m, name in combined.NAMES.items()}
        parts = [f"{name} {cell(values)}" for name, values in found.items() if values]
        said += [f"{task}: {', '.join(parts)}{untaught(found, task)}"] if parts else []
    return f"MiniLM: {'; '.join(said)}" if said else ""


def once(results: Everything, names: dict[str, str]) -> str:
    """One run a method, of experiments/methods.py: accuracy and how many rows it is of."""
    said = []
    for task, model in (("sst2", "MiniLM, SST-2"), ("snippets", "SmolLM2, snippets")):
        found = {name: results["methods"].get(f"{task}:{method}") for method, name in names.items()}
        if all(found.values()):
            parts = [f"{name} {100 * held['accuracy']:.1f}" for name, held in found.items() if held]
            said.append(f"{model} (n = {next(iter(found.values()))['n']}): {', '.join(parts)}")
    return f"one seed, rates guessed, few steps: {'; '.join(said)}" if said else ""


def shots_here(results: Everything) -> str:
    (table,) = shots.show(shots.Config(), results["shots"]).tables
    said = "; ".join(f"{name} {two} (of all words {word})" for name, word, two in table.rows if two)
    return said and f"SmolLM2 on movie snippets, the right one of two words: {said}. GPT-3's cannot be made"


def which_here(cases: tuple[tuple[str, int], ...]) -> Callable[[Everything], str]:
    def here(results: Everything) -> str:
        found = {f"{w} r={r}": of(results["which"], f"{w} r={r}") for w, r in cases}
        held = {name: values for name, values in found.items() if values}
        if not held:
            return ""
        low, high = (pick(held, key=lambda name: mean(held[name])[0]) for pick in (min, max))
        return (
            f"MiniLM on SST-2, {len(held)} of {len(found)} cases: best {high} {cell(held[high])}, worst {low} "
            f"{cell(held[low])}{untaught(held)}"
        )

    return here


LARGER = {"SST-2": 0.53, "MRPC": 0.685}
"""Who is no better has learned to name the larger class, 50.9 and 68.4 % of dev, or hardly more."""


def untaught(held: dict[str, list[float]], task: str = "SST-2") -> str:
    """Which runs learned nothing, as a mean hides them."""
    said = []
    for name, scores in held.items():
        lost = [f"{100 * score:.1f}" for score in scores if score <= LARGER[task]]
        if lost:
            count = "each seed" if len(lost) == len(scores) else f"{len(lost)} of {len(scores)} seeds"
            said.append(f"; with {name} {count} learned nothing ({', '.join(dict.fromkeys(lost))})")
    return "".join(said)


def ranks_here(results: Everything) -> str:
    named = {"q": "q alone", "qkvo": "all four"}
    said = []
    for weights, name in named.items():
        found = {rank: of(results["which"], f"{weights} r={rank}") for w, rank in which.RANKS if w == weights}
        parts = [f"r = {rank} {cell(scores)}" for rank, scores in found.items() if scores]
        said += (
            [f"{name}: {', '.join(parts)}{untaught({f'r = {rank}': s for rank, s in found.items()})}"] if parts else []
        )
    return f"MiniLM on SST-2: {'; '.join(said)}" if said else ""


def why_here(kind: str, say: Callable[[str, dict[str, Any]], str]) -> Callable[[Everything], str]:
    def here(results: Everything) -> str:
        said = []
        for name in results["why"]:
            if name.endswith(f"/{kind}"):
                weights = why.by_weight(results["why"], name)
                said += [f"{name.partition('/')[0]}: {'; '.join(say(w, found) for w, found in weights.items())}"]
        return ". ".join(said)

    return here


def overlap_text(weight: str, found: dict[str, Any]) -> str:
    phi = lambda key: np.mean(found["A"][f"phi({key}, by layer"])
    return (
        f"{weight} phi(1, 1) of A {phi('1, 1) of ranks'):.2f} between ranks, {phi('1, 1) of seeds'):.2f} between seeds "
        f"(random {1 / found['d']:.3f}), phi(1, 64) {phi('1, all) of ranks'):.2f} (random {64 / found['d']:.2f})"
    )


def amplified_text(weight: str, found: dict[str, Any]) -> str:
    seven = found["table 7, r = 8"]
    return (
        f"{weight} by {seven['factor']:.2g} (W in the change's directions {seven['of change']:.2g}, in its own "
        f"{seven['of W']:.3g}, in random ones {seven['of random']:.2g})"
    )


def full_text(weight: str, found: dict[str, Any]) -> str:
    rank = np.mean(found["effective rank"])
    share = np.mean(found["share of 8"])
    return f"{weight}: the first 8 directions hold {share:.0%}, effective rank {rank:.0f} of {found['size']}"


def planned(results: Everything, key: str) -> tuple[float, float] | None:
    held = [results["cost"].get(f"plan/gpt3-175b/{method}") for method in ("full", "lora")]
    return (held[0][key], held[1][key]) if held[0] and held[1] else None


def memory_here(results: Everything) -> str:
    found = planned(results, "states, GB")
    if not found:
        return ""
    less = lambda found: f"{found[0]:,.0f} GB -> {found[1]:,.0f} GB ({found[0] / found[1]:.1f}x)"
    whole = planned(results, "step, GB")
    said = f"by plan over 128 chips: {less(found)} of base, factors, gradients and Adam's state"
    if not whole:
        return said
    return (
        f"{said}; with the activations and temporaries of 128 rows of 1,024 tokens {less(whole)}. By the TPU compiler, "
        "each on a slice with room and a row a chip, all of it: 1,936 GB -> 429 GB (4.5x; docs/scale.md)"
    )


def steps(results: Everything, key: str) -> list[tuple[str, float, float]]:
    """(model and task, full fine-tuning's, LoRA's) of experiments/methods.py: "seconds" of the processor or "bytes"."""
    out = []
    for task, model in (("sst2", "MiniLM on SST-2"), ("snippets", "SmolLM2 on snippets")):
        full, lora = (results["methods"].get(f"{task}:{method}") for method in ("full", "lora"))
        out += [(model, full[key], lora[key])] if full and lora else []
    return out


def faster_here(results: Everything) -> str:
    said = [f"{model} {full / lora:.2f}" for model, full, lora in steps(results, "seconds")]
    return f"full fine-tuning's step in times of LoRA's (processor time): {', '.join(said)}" if said else ""


def step_memory_here(results: Everything) -> str:
    said = [
        f"{model} {full / 1e6:,.0f} -> {lora / 1e6:,.0f} MB ({full / lora:.1f}x)"
        for model, full, lora in steps(results, "bytes")
    ]
    return f"the compiled step's arguments and temporaries: {', '.join(said)}" if said else ""


def checkpoint_here(results: Everything) -> str:
    found = planned(results, "checkpoint, MB at 16 bits")
    return f"by plan: {found[0] / 1e3:,.0f} GB -> {found[1]:.1f} MB ({found[0] / found[1]:,.0f}x)" if found else ""


def switching_here(results: Everything) -> str:
    held = results["cost"].get("switching")
    if not held:
        return ""
    return (
        f"SmolLM2-135M: {held['put two factors where two were']:.2f} ms to exchange factors in memory, "
        f"{held['merged: subtract one, add the other']:.0f} ms to subtract one BA and add another, "
        f"{held['read an adapter from disk']:.0f} ms to read an adapter, "
        f"{held['read the whole model']:,.0f} ms the model"
    )


def e2e_here(results: Everything) -> str:
    said = set_here(results, "e2e", tuple(nlg.NAMES))
    steps = next(steps for name, steps, _ in e2e.Config().sets if name == "e2e")
    return said and f"SmolLM2, {steps} steps on E2E's dev set (its train set is not here): {said}"


def set_here(results: Everything, name: str, figures: tuple[str, ...] = ("bleu",)) -> str:
    """Every method's, of LoRA and full fine-tuning all `figures`."""
    said = []
    for method, called in e2e.NAMES.items():
        shown = figures if method in DECIDE else figures[:1]
        found = [(nlg.NAMES[figure], of(results["e2e"], f"{name}/{method}", figure)) for figure in shown]
        said += [f"{called} {', '.join(f'{kind} {cell(v, 1.0)}' for kind, v in found)}"] if found[0][1] else []
    return "; ".join(said)


def sets_here(results: Everything) -> str:
    said = {name: set_here(results, name) for name in ("webnlg", "dart")}
    return ". ".join(f"{name}: {text}" for name, text in said.items() if text)


def domains_here(results: Everything) -> str:
    held = results["domains"].get("every adapter on every domain")
    if not held:
        return "every adapter on every domain: docs/serving.md; mixed: not run yet"
    own = np.mean([held[d][d]["first"] for d in held["none"]])
    others = np.mean([held[a][b]["first"] for a in held["none"] for b in held["none"] if a != b])
    base = np.mean([held["none"][d]["first"] for d in held["none"]])
    mixed = {name: np.mean([one["first"] for one in held[name].values()]) for name in ("mean", "ties")}
    return (
        f"SmolLM2, right words: base {base:.1%}, an adapter on its own domain {own:.1%}, on the others {others:.1%}; "
        f"mixed by mean {mixed['mean']:.1%}, by ties {mixed['ties']:.1%}"
    )


def watched(results: Everything, method: str) -> list[dict[str, Any]]:
    """The seeds of `forgetting`."""
    return [held for name, held in results["forgetting"].items() if name.startswith(f"{method}/")]


def overfit(runs: list[dict[str, Any]]) -> float:
    """How far the loss on held-out rows lies above that on the rows it saw, at the end."""
    return float(np.mean([run["held out, loss"][-1] - run["seen, loss"][-1] for run in runs]))


def forgetting_here(results: Everything) -> str:
    said = []
    for method in ("full", "lora"):
        runs = watched(results, method)
        if runs:
            ends = [(run["general text, perplexity"][0], run["general text, perplexity"][-1]) for run in runs]
            first, last = np.mean(ends, axis=0)
            said.append(
                f"{method}: general perplexity {first:.1f} -> {last:.1f}, "
                f"held-out loss less seen {overfit(runs):.2f} ({len(runs)})"
            )
    return "; ".join(said)


def dpo_here(results: Everything) -> str:
    values = of(results["preference"], "dpo")
    return f"SmolLM2: {cell(values)} % of held-out pairs in order, 50 by chance" if values else ""


def dimension_here(results: Everything) -> str:
    from experiments.paper import dimension

    tables = dimension.show(dimension.Config(), results["dimension"]).tables
    said = "; ".join(f"{row[0]}: D = {row[5]}, {row[6]} of its parameters" for row in tables[0].rows) if tables else ""
    return said and f"{said} (one seed, a grid of steps of four)"


def released_here(results: Everything) -> str:
    held = results["released"].get("factors")
    if not held:
        return ""
    rank = {name: held[name]["effective rank"] for name in ("query", "value")}
    said = [f"{name} {min(r):.1f} to {max(r):.1f} (mean {np.mean(r):.1f})" for name, r in rank.items()]
    shared = np.mean([row[2] for row in held["query against value"]])
    return (
        f"effective rank of 8: {', '.join(said)}; query and value read the same directions to phi(8, 8) = {shared:.3f} "
        f"(random {held['random'][2]:.3f})"
    )
