"""What the paper says, claim by claim, and what was found here; nothing is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.paper import combined, few, glue, which
from experiments.paper.chosen import of
from experiments.paper.tables import cell, mean

Everything = dict[str, dict[str, Any]]
"""Results of every experiment by its name; {} where there are none."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """`here`: what was found, of all results; "" while it is not run. `how`: the command that finds it."""

    claim: str
    paper: str
    here: Callable[[Everything], str]
    how: str


def always(text: str) -> Callable[[Everything], str]:
    return lambda results: text


RECIPE = "needs the model's weights, which are not to be had here: the recipe's settings are dry-run by the tests"
RUN = "python -m experiments.all {}"


def glue_here(results: Everything) -> str:
    done, config = results["glue"], glue.Config()
    average, full = glue.averages(config, done)
    if full:
        best = {name: f"{100 * average[name]:.1f}" for name in ("full", "lora")}
        gap = 100 * (average["lora"] - average["full"])
        size = int(of(done, f"{full[0]}/lora", "trained")[0])
        agree = "agrees" if gap > -1 else "does not agree"
        return (
            f"MiniLM on {', '.join(full)}: LoRA {best['lora']}, full {best['full']} ({gap:+.1f} at "
            f"{size / 22_713_216:.1%} of the parameters): {agree}"
        )
    both = [t for t, _ in config.tasks if of(done, f"{t}/lora") and of(done, f"{t}/full")]
    said = [f"{t}: LoRA {cell(of(done, f'{t}/lora'))}, full {cell(of(done, f'{t}/full'))}" for t in both]
    return f"MiniLM, part of the table: {'; '.join(said)}" if said else ""


def few_here(results: Everything) -> str:
    said = []
    for rows in few.Config().rows:
        found = {few.NAMES[m]: of(results["few"], f"{rows}/{m}") for m in few.NAMES}
        parts = [f"{name} {cell(values)}" for name, values in found.items() if values]
        said += [f"{rows:,} rows: {', '.join(parts)}"] if parts else []
    return "; ".join(said)


def combined_here(results: Everything) -> str:
    said = []
    for task, _ in combined.Config().tasks:
        found = {name: of(results["combined"], f"{task}/{m}") for m, name in combined.NAMES.items()}
        parts = [f"{name} {cell(values)}" for name, values in found.items() if values]
        said += [f"{task}: {', '.join(parts)}"] if parts else []
    return "; ".join(said)


def which_here(cases: tuple[tuple[str, int], ...]) -> Callable[[Everything], str]:
    def here(results: Everything) -> str:
        found = {f"{w} r={r}": of(results["which"], f"{w} r={r}") for w, r in cases}
        held = {name: values for name, values in found.items() if values}
        if not held:
            return ""
        low, high = (pick(held, key=lambda name: mean(held[name])[0]) for pick in (min, max))
        seeds = max(map(len, held.values()))
        return (
            f"MiniLM on SST-2, {len(held)} of {len(found)} cases, up to {seeds} seeds: best {high} {cell(held[high])}, "
            f"worst {low} {cell(held[low])}"
        )

    return here


def why_here(kind: str, say: Callable[[str, dict[str, Any]], str]) -> Callable[[Everything], str]:
    def here(results: Everything) -> str:
        said = []
        for name, held in results["why"].items():
            if name.endswith(f"/{kind}"):
                weights = {w: found for w, found in held.items() if w != "seconds"}
                said += [f"{name.partition('/')[0]}: {'; '.join(say(w, found) for w, found in weights.items())}"]
        return ". ".join(said)

    return here


def overlap_text(weight: str, found: dict[str, Any]) -> str:
    top = {what: np.mean(found[what]["phi(1, all) of ranks, by layer"]) for what in ("A", "AB")}
    return f"{weight} phi(1, 64) of A {top['A']:.2f}, of A·B {top['AB']:.2f} (random {64 / found['d']:.2f})"


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
    less = f"{found[0]:,.0f} GB -> {found[1]:,.0f} GB ({found[0] / found[1]:.1f}x)"
    return f"by plan: {less}, base, factors, gradients and Adam's state"


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
    found = {name: of(results["e2e"], f"e2e/{name}") for name in ("lora", "full")}
    return "; ".join(f"{name} BLEU {cell(values, 1.0)}" for name, values in found.items() if values)


def sets_here(results: Everything) -> str:
    found = {s: of(results["e2e"], f"{s}/lora") for s in ("webnlg", "dart")}
    return "; ".join(f"{name}: LoRA BLEU {cell(values, 1.0)}" for name, values in found.items() if values)


def domains_here(results: Everything) -> str:
    held = results["domains"].get("every adapter on every domain")
    if not held:
        return ""
    own = np.mean([held[d][d]["first"] for d in held["none"]])
    others = np.mean([held[a][b]["first"] for a in held["none"] for b in held["none"] if a != b])
    base = np.mean([held["none"][d]["first"] for d in held["none"]])
    mixed = {name: np.mean([one["first"] for one in held[name].values()]) for name in ("mean", "ties")}
    return (
        f"SmolLM2, right words: base {base:.1%}, an adapter on its own domain {own:.1%}, on the others {others:.1%}; "
        f"mixed by mean {mixed['mean']:.1%}, by ties {mixed['ties']:.1%}"
    )


def forgetting_here(results: Everything) -> str:
    said = []
    for method in ("full", "lora"):
        runs = [held for name, held in results["forgetting"].items() if name.startswith(f"{method}/")]
        if runs:
            ends = [(run["general text, perplexity"][0], run["general text, perplexity"][-1]) for run in runs]
            gap = np.mean([run["held out, loss"][-1] - run["seen, loss"][-1] for run in runs])
            first, last = np.mean(ends, axis=0)
            said.append(
                f"{method}: general perplexity {first:.1f} -> {last:.1f}, "
                f"held-out loss less seen {gap:.2f} ({len(runs)})"
            )
    return "; ".join(said)


def dpo_here(results: Everything) -> str:
    values = of(results["preference"], "dpo")
    return f"SmolLM2: {cell(values)} % of held-out pairs in order, 50 by chance" if values else ""


def dimension_here(results: Everything) -> str:
    from experiments.paper import dimension

    tables = dimension.show(dimension.Config(), results["dimension"]).tables
    return "; ".join(f"{row[0]}: D = {row[5]}, {row[6]} of its parameters" for row in tables[0].rows) if tables else ""


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


CLAIMS = [
    Claim(
        "Trainable parameters, every model and method of the tables",
        "formulas and printed counts",
        always("every formula exactly, on the trees that the methods make; printed numbers to rounding, or the reason"),
        "python experiments/counts.py",
    ),
    Claim("GPT-3 175B, training memory", "1.2 TB -> 350 GB (3x)", memory_here, RUN.format("cost")),
    Claim(
        "GPT-3 175B, checkpoint at r = 4 on q and v", "350 GB -> 35 MB (10,000x)", checkpoint_here, RUN.format("cost")
    ),
    Claim(
        "Training is faster",
        "about 25 % on GPT-3",
        always("SmolLM2-135M on two CPU cores: see docs/performance.md, and docs/methods.md for every method's step"),
        "python -m experiments.bench",
    ),
    Claim(
        "No latency added when merged; adapter layers add 2 to 30 %",
        "GPT-2 M: merged 0; adapter L +2.2, +5.0, +20.7 %; H +3.0, +8.4, +30.3 %",
        always(
            "GPT-2 M's width, 6 layers, 4x64 and 1x32 on a busy CPU: merged +1.3 and -0.7 % (noise), adapter L +3.5 "
            "and +7.3 %, H +5.6 and +2.1 % (docs/serving.md); the paper's grid needs an accelerator"
        ),
        "python experiments/serving/latency.py",
    ),
    Claim("Switching tasks is cheap: subtract one BA, add another", "", switching_here, RUN.format("cost")),
    Claim("GLUE: LoRA as good as full fine-tuning", "RoBERTa-base 87.2 against 86.4", glue_here, RUN.format("glue")),
    Claim(
        "The same on RoBERTa-base, large and DeBERTa-XXL, SST-2 too",
        "87.2 / 89.0 / 91.3 on average; SST-2 95.1 / 96.2 / 96.9",
        always(RECIPE),
        "python -m experiments.recipes show roberta-base/SST-2",
    ),
    Claim(
        "E2E: LoRA above full fine-tuning and adapters", "GPT-2 M: BLEU 70.4 against 68.2", e2e_here, RUN.format("e2e")
    ),
    Claim("DART and WebNLG likewise", "GPT-2 M: 47.1 and 55.3", sets_here, RUN.format("e2e")),
    Claim(
        "The same on GPT-2 M and L",
        "BLEU 70.4 and 70.4 (E2E)",
        always(RECIPE),
        "python -m experiments.recipes show gpt2-medium/e2e",
    ),
    Claim(
        "GPT-3: WikiSQL, MNLI, SAMSum by six methods",
        "LoRA 74.0 / 91.7 / 53.8-29.8-45.9 at best",
        always("GPT-3's weights are not public: its shapes are planned, no figure of its tables can be made"),
        "jlora plan --model gpt3-175b --rank 4 --targets c_attn --topology v5p:4x4x8",
    ),
    Claim(
        "GPT-3: fine-tuned far above few-shot",
        "MNLI 89.5 against 40.6, RTE 85.4 against 69.0",
        always(
            "SmolLM2 names the right word for 0 % of movie snippets before and 91.4 % after (README), without examples "
            "in the prompt; GPT-3's cannot be made"
        ),
        "jlora demo",
    ),
    Claim(
        "LoRA with prefixes: PreEmbed helps on one task, PreLayer hurts a little",
        "WikiSQL better with PreEmbed than either; MNLI no better",
        combined_here,
        RUN.format("combined"),
    ),
    Claim(
        "Few examples: LoRA above full at 100, equal later; PreEmbed near chance at 100",
        "MNLI-100, 1k, 10k",
        few_here,
        RUN.format("few"),
    ),
    Claim(
        "One budget: q and v, or all four at a lower rank, beat one weight at a higher one",
        "q,v 73.7 / 91.3; all four 73.7 / 91.7; q alone 70.4 / 91.0",
        which_here(which.BUDGET),
        RUN.format("which"),
    ),
    Claim(
        "A rank of 1 is enough for q and v",
        "WikiSQL: 73.4 at r = 1, 73.5 at r = 64",
        which_here(tuple(case for case in which.RANKS if case[0] == "qv")),
        RUN.format("which"),
    ),
    Claim(
        "Ranks 8 and 64 share their top direction, the rest hardly; seeds too",
        "phi above 0.5 for the first direction",
        why_here("lora", overlap_text),
        RUN.format("why"),
    ),
    Claim(
        "The change amplifies directions that W has and does not stress",
        "GPT-3, layer 48, r = 4: by 21.5; 0.32 in its directions, 21.67 in W's, 0.02 in random ones",
        why_here("lora", amplified_text),
        RUN.format("why"),
    ),
    Claim(
        "What full fine-tuning changes has a low rank (the hypothesis behind LoRA)",
        "taken from Aghajanyan et al.; not measured",
        why_here("full", full_text),
        RUN.format("why"),
    ),
    Claim("The authors' RoBERTa-base MNLI adapter, read", "", released_here, RUN.format("released")),
    Claim(
        "The larger model needs no more dimensions for its size",
        "Aghajanyan et al.",
        dimension_here,
        RUN.format("dimension"),
    ),
    Claim("Full fine-tuning forgets and overfits more", "a talk's claim", forgetting_here, RUN.format("forgetting")),
    Claim("One base, an adapter a domain, swapped and mixed", "", domains_here, RUN.format("domains")),
    Claim(
        "A quantised base (QLoRA) learns as well",
        "Dettmers et al.",
        always("SmolLM2 in float32, int8, NF4 and int4 side by side: docs/quantised.md"),
        "python experiments/quantised.py",
    ),
    Claim("DPO trains on preferences of people", "Rafailov et al.", dpo_here, RUN.format("preference")),
    Claim(
        "Several adapters are trained at once over one base",
        "",
        always("`jlora sweep`: equals separate runs to rounding (docs/training.md, tests/train/test_sweep.py)"),
        "jlora sweep --config run.yaml --grid rank=4,16",
    ),
    Claim(
        "Initialisation, scale and merging: A random, B zero, alpha / r, W = W0 + (alpha / r) A B",
        "sections 4.1 and 4.2",
        always(
            "A Kaiming-uniform as released, or Gaussian; the tests hold start, merge and files against loralib and PEFT"
        ),
        "python -m pytest tests/test_lora.py tests/io/test_loralib.py",
    ),
]
