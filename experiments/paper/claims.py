"""What the paper says, claim by claim, and what was found here; nothing is left out."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable

from experiments.paper import found as f
from experiments.paper import holds as h
from experiments.paper import latency, quantised, which
from experiments.paper.found import Everything
from experiments.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class Claim:
    """`here`: what was found, of all results; "" while it is not run. `how`: the command that finds it. `holds`:
    agrees, in part, does not agree, or open.
    """

    claim: str
    paper: str
    here: Callable[[Everything], str]
    how: str
    holds: Callable[[Everything], str] = lambda results: ""


def always(text: str) -> Callable[[Everything], str]:
    return lambda results: text


OPEN = always("open: its weights are not here")
RECIPE = "needs the model's weights, which are not to be had here: the recipe's settings are dry-run by the tests"
NO_CLAIM = always("no claim to hold it against")
RUN = "python -m experiments.all {}"
METHODS = "python experiments/methods.py --sst2 GLUE/SST-2 --output experiments/results/methods.json"


CLAIMS = [
    Claim(
        "Trainable parameters, every model and method of the tables",
        "formulas and printed counts",
        always(
            "every formula exactly, on the trees that the methods make; the printed numbers to rounding, but for those "
            "that the script lists with a reason, and ten for which none was found: GPT-2 M's and GPT-3's full counts, "
            "GPT-3's BitFit, six prefix-layers (one with LoRA) and one prefix-embedding (0.49 million printed as 0.4)"
        ),
        "python experiments/counts.py",
        always("agrees"),
    ),
    Claim("GPT-3 175B, training memory", "1.2 TB -> 350 GB (3x)", f.memory_here, RUN.format("cost"), h.memory_holds),
    Claim(
        "Training memory at our sizes",
        "two thirds less with Adam",
        f.step_memory_here,
        METHODS,
        h.step_memory_holds,
    ),
    Claim(
        "GPT-3 175B, checkpoint at r = 4 on q and v",
        "350 GB -> 35 MB (10,000x)",
        f.checkpoint_here,
        RUN.format("cost"),
        h.checkpoint_holds,
    ),
    Claim(
        "Training is faster",
        "about 25 % on GPT-3",
        f.faster_here,
        METHODS,
        h.faster_holds,
    ),
    Claim(
        "No latency added when merged; adapter layers add 2 to 30 %",
        "GPT-2 M, a GPU, 32x512, 16x256, 1x128: merged 0; adapter L +2.2, +5.0, +20.7 %; H +3.0, +8.4, +30.3 %",
        latency.here,
        RUN.format("latency"),
        latency.holds,
    ),
    Claim(
        "Switching tasks is cheap: subtract one BA, add another",
        "section 4.2; no figure",
        f.switching_here,
        RUN.format("cost"),
        h.switching_holds,
    ),
    Claim(
        "GLUE: LoRA as good as full fine-tuning",
        "average of 8, LoRA and full: RoBERTa-base 87.2, 86.4; large 89.0, 88.9; DeBERTa-XXL 91.3, 91.1",
        f.glue_here,
        RUN.format("glue"),
        h.glue_holds,
    ),
    Claim(
        "GLUE: BitFit and adapters of LoRA's size below LoRA",
        "RoBERTa-base: BitFit 85.2, adapters 84.4 and 85.4, LoRA 87.2",
        f.glue_others,
        RUN.format("glue"),
        h.others_hold,
    ),
    Claim(
        "MNLI and QQP",
        "RoBERTa-base: LoRA 87.5 (matched and mismatched together) and 90.8",
        always("their rows are not here: recipes only"),
        "python -m experiments.recipes show roberta-base/MNLI",
        always("open: its rows are not here"),
    ),
    Claim(
        "The same on RoBERTa-base, large and DeBERTa-XXL, SST-2 too",
        "SST-2: LoRA 95.1 / 96.2 / 96.9, full 94.8 / 96.4 / 97.2",
        always(RECIPE),
        "python -m experiments.recipes show roberta-base/SST-2",
        OPEN,
    ),
    Claim(
        "E2E: LoRA above full fine-tuning and adapters",
        "GPT-2 M, BLEU, NIST, METEOR, ROUGE-L, CIDEr: LoRA 70.4, 8.85, 46.8, 71.8, 2.53; full 68.2, 8.62, 46.2, 71.0, "
        "2.47; BLEU of adapter L 68.9, H 67.3, FT-top2 68.1, prefix-layer 69.7",
        f.e2e_here,
        RUN.format("e2e"),
        h.e2e_holds,
    ),
    Claim("DART and WebNLG likewise", "GPT-2 M: 47.1 and 55.3", f.sets_here, RUN.format("e2e"), h.sets_hold),
    Claim(
        "The same on GPT-2 M and L",
        "BLEU on E2E, LoRA and full: M 70.4, 68.2; L 70.4, 68.5",
        always(RECIPE),
        "python -m experiments.recipes show gpt2-medium/e2e",
        OPEN,
    ),
    Claim(
        "GPT-3: WikiSQL, MNLI, SAMSum by six methods",
        "LoRA 74.0 / 91.7 / 53.8-29.8-45.9 at best",
        always("GPT-3's weights are not public: its shapes are planned, no figure of its tables can be made"),
        "jlora plan --model gpt3-175b --rank 4 --targets c_attn --topology v5p:4x4x8 --batch 128 --seq 2048",
        OPEN,
    ),
    Claim(
        "GPT-3: fine-tuned far above few-shot",
        "MNLI 89.5 against 40.6, RTE 85.4 against 69.0",
        f.shots_here,
        RUN.format("shots"),
        h.shots_hold,
    ),
    Claim(
        "LoRA with prefixes: PreEmbed helps on one task, PreLayer hurts a little",
        "WikiSQL better with PreEmbed than either; MNLI no better",
        f.combined_here,
        RUN.format("combined"),
        h.combined_holds,
    ),
    Claim(
        "Few examples: LoRA above full at 100, equal later; PreEmbed near chance at 100",
        "MNLI: PreEmbed 37.6 at 100 (chance 33.3); LoRA above full there, within 0.3 of it at 1k and 10k",
        f.few_here,
        RUN.format("few"),
        h.few_holds,
    ),
    Claim(
        "One budget: q and v, or all four at a lower rank, beat one weight at a higher one",
        "q,v 73.7 / 91.3; all four 73.7 / 91.7; q alone 70.4 / 91.0",
        f.which_here(which.BUDGET),
        RUN.format("which"),
        h.which_holds,
    ),
    Claim(
        "A rank of 1 is enough for q and v",
        "WikiSQL: 73.4 at r = 1, 73.5 at r = 64",
        f.which_here(tuple(case for case in which.RANKS if case[0] == "qv")),
        RUN.format("which"),
        h.rank_holds,
    ),
    Claim(
        "With q alone a rank of 1 is too small, with all four it is enough",
        "WikiSQL: q 68.8 at r = 1, 70.4 at r = 8; all four 74.1 at r = 1, 74.0 at r = 8",
        f.ranks_here,
        RUN.format("which"),
        h.ranks_hold,
    ),
    Claim(
        "Ranks 8 and 64 share their top direction; two seeds share some",
        "phi above 0.5 for the first direction",
        f.why_here("lora", f.overlap_text),
        RUN.format("why"),
        h.overlap_holds,
    ),
    Claim(
        "The change amplifies directions that W has and does not stress",
        "GPT-3, layer 48, r = 4: by 21.5; 0.32 in its directions, 21.67 in W's, 0.02 in random ones",
        f.why_here("lora", f.amplified_text),
        RUN.format("why"),
        h.amplified_holds,
    ),
    Claim(
        "What full fine-tuning changes has a low rank (the hypothesis behind LoRA)",
        "taken from Aghajanyan et al.; not measured",
        f.why_here("full", f.full_text),
        RUN.format("why"),
        h.low_rank_holds,
    ),
    Claim(
        "The authors' RoBERTa-base MNLI adapter, read (table 7 of it would need its base, which is not here)",
        "released files",
        f.released_here,
        RUN.format("released"),
        NO_CLAIM,
    ),
    Claim(
        "A tiny share of the dimensions is enough; a larger model's share is no larger",
        "Aghajanyan et al.",
        f.dimension_here,
        RUN.format("dimension"),
        h.dimension_holds,
    ),
    Claim(
        "Full fine-tuning forgets and overfits more",
        "a talk's claim",
        f.forgetting_here,
        RUN.format("forgetting"),
        h.forgetting_holds,
    ),
    Claim(
        "One base, an adapter a domain, swapped and mixed",
        "section 4.2; no figure",
        f.domains_here,
        RUN.format("domains"),
        NO_CLAIM,
    ),
    Claim(
        "A quantised base (QLoRA) learns as well",
        "Dettmers et al.",
        quantised.here,
        RUN.format("quantised"),
        quantised.holds,
    ),
    Claim(
        "DPO trains on pairs (here: ordered by people's separate ratings of unrelated snippets)",
        "Rafailov et al.",
        f.dpo_here,
        RUN.format("preference"),
        h.preference_holds,
    ),
    Claim(
        "The recipes (section D)",
        "optimiser, rates, batches, epochs, warm-up, lengths, ranks",
        always(
            f"{len(RECIPES)} settings files of `jlora train`, each with its command, its slice, the paper's figure and "
            "what is otherwise here. The tests read all of them, dry-run one of each model at its size, and compile a "
            "step for v5e of RoBERTa-base and large, DeBERTa-XXL, GPT-2 M, GPT-2 L, Llama-3-8B, v5p of GPT-2 M and two "
            "layers of GPT-3. They need larger machines, weights and rows that are not here"
        ),
        "python -m experiments.recipes",
        always("open: compiled, not run"),
    ),
    Claim(
        "Several adapters are trained at once over one base",
        "",
        always("`jlora sweep`: equals separate runs to rounding (docs/training.md, tests/train/test_sweep.py)"),
        "jlora sweep --config run.yaml --grid rank=4,16",
        always("agrees"),
    ),
    Claim(
        "Initialisation, scale and merging: A random, B zero, alpha / r, W = W0 + (alpha / r) A B",
        "sections 4.1 and 4.2",
        always(
            "A Kaiming-uniform as released, or Gaussian; the tests hold start, merge and files against loralib and PEFT"
        ),
        "python -m pytest tests/test_lora.py tests/io/test_loralib.py",
        always("agrees"),
    ),
]

KEY = """A method is called above another where the 95 % interval of their difference over seeds says so
(Student's t, one variance for both; one seed is held against several). *Agrees*: every part of the claim holds;
*as far as it can be told*: the parts that these seeds decide; *in part*: some of those; *does not agree*: none;
*cannot be told apart*: the seeds decide nothing; *open*: it could not be run here; *so far*: methods or seeds
are left to run. What each verdict weighs is in `experiments/paper/holds.py`."""


def summary(results: Everything) -> str:
    """How many claims have which verdict."""
    counts = collections.Counter(
        re.split(",|:| as far| so far| for ", claim.holds(results) or "open")[0] for claim in CLAIMS
    )
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
