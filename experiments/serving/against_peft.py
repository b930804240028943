"""Eight requests of four adapters: this engine against transformers + PEFT (torch), on one machine, in turn.

    pip install "jlora[serve]" torch peft && python experiments/serving/against_peft.py [--new 32] [--rounds 3]

SmolLM2-135M with four adapters of rank 8 on q and v, eight prompts of 32 tokens, greedy, float32, ends ignored. The
peer gets one batch with `adapter_names` (PEFT's mixed batches) and its default cache; here eight requests are submitted
at once. Prefill is the time to the last first token; decoding the tokens after it by the time they take. The answers of
both are compared. "cpu" figures count the time of all threads instead of the clock's. --threads 1: torch's threads,
which wait for each other by spinning and suffer where other programs have the cores.
"""

from __future__ import annotations

import argparse
import json
import queue
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from paired import table

import jlora
from jlora.io import load
from jlora.io.peft import save_peft
from jlora.io.save import save
from jlora.serve.engine import Engine
from jlora.serve.request import Ask

TEXT = (
    "The film begins in a small town by the sea, where nobody has seen a stranger for years and everybody knows why. "
)


def adapters(base: Any, folder: Path, names: list[str]) -> list[Path]:
    """Four random adapters that change what is written, in PEFT's format."""
    config = jlora.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    out = []
    for n, name in enumerate(names):
        _, lora = jlora.lorafy(base.params, config=config, key=jax.random.key(n), layouts=base.layouts)
        draw = np.random.default_rng(n)
        lora = jax.tree.map(lambda x, draw=draw: np.asarray(x) + draw.normal(0, 0.01, x.shape).astype(np.float32), lora)
        out.append(save_peft(folder / name, lora, config, base.tensors, base.source))
    return out


class Ours:
    def __init__(self, folders: list[Path], prompts: list[list[int]], new: int) -> None:
        began = time.perf_counter()
        self.base = load("smollm2-135m-instruct", scan_layers=jax.default_backend() != "cpu")
        self.engine = Engine(self.base, slots=len(prompts), together=len(prompts), max_length=1024).start()
        for folder in folders:
            self.engine.load(folder.name, folder).result()
        self.asks = [
            Ask(tuple(prompt), self.engine.shelf.held[folders[n % 4].name], max_tokens=new, ignore_eos=True)
            for n, prompt in enumerate(prompts)
        ]
        self.loaded = time.perf_counter() - began

    def run(self) -> tuple[float, float, list[list[int]]]:
        """(seconds to the last first token, seconds after it, the answers)."""
        ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
        began = time.perf_counter()
        now = lambda event: ends.put(time.perf_counter()) if event.finish else None
        requests = [self.engine.submit(ask, now) for ask in self.asks]
        last = max(ends.get() for _ in requests)
        first = max(r.first - r.arrived + (r.arrived - requests[0].arrived) for r in requests)
        return first, last - began - first, [r.new for r in requests]


class Theirs:
    def __init__(self, folders: list[Path], prompts: list[list[int]], new: int, hub: Path, threads: int) -> None:
        import peft
        import torch
        import transformers

        if threads:
            torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.torch, self.new = torch, new
        model = transformers.AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32).eval()
        self.model = peft.PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            self.model.load_adapter(folder, adapter_name=folder.name)
        self.names = [folders[n % 4].name for n in range(len(prompts))]
        self.tokens = torch.tensor(prompts)

    def write(self, count: int) -> Any:
        with self.torch.inference_mode():
            how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "adapter_names": self.names}
            mask = self.torch.ones_like(self.tokens)
            return self.model.generate(input_ids=self.tokens, attention_mask=mask, pad_token_id=0, **how)

    def run(self) -> tuple[float, float, list[list[int]]]:
        began = time.perf_counter()
        self.write(1)
        first = time.perf_counter() - began
        began = time.perf_counter()
        out = self.write(self.new)
        return first, time.perf_counter() - began - first, out[:, self.tokens.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=32, help="tokens a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its default")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = load("smollm2-135m-instruct")
        folders = adapters(base, Path(place), ["film", "tweets", "news", "goods"])
        save(Path(place) / "hub", base, base.params, dtype=np.float32)
        ids = base.tokenizer(TEXT * 4)["input_ids"]
        del base
        prompts = [ids[n : n + 32] for n in range(8)]
        theirs, ours = (
            Theirs(folders, prompts, given.new, Path(place) / "hub", given.threads),
            Ours(folders, prompts, given.new),
        )
        sides = {"transformers + PEFT": theirs.run, "jlora": ours.run}
        wrote = {name: run()[2] for name, run in sides.items()}  # the first run compiles and warms up
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(given.rounds):
            for name, run in sides.items():
                used = time.process_time()
                first, rest, _ = run()
                tokens = len(prompts) * (given.new - 1) / rest
                cpu = time.process_time() - used
                found[name].append({"prefill": first, "tokens": tokens, "cpu": cpu})
        ours.engine.stop()
    same = np.mean([a == b for a, b in zip(*wrote.values(), strict=True)])
    median = lambda name, key: float(np.median([f[key] for f in found[name]]))
    ratio = lambda key: float(np.median([b[key] / a[key] for a, b in zip(*found.values(), strict=True)]))
    rows = [
        [name, f"{median(name, 'prefill'):.2f}", f"{median(name, 'tokens'):.1f}", f"{median(name, 'cpu'):.1f}"]
        for name in sides
    ]
    rows.append(["ratio", f"{1 / ratio('prefill'):.2f}", f"{ratio('tokens'):.2f}", f"{1 / ratio('cpu'):.2f}"])
    print(table(["", "prefill, s", "decoded tokens/s", "cpu s, all of it"], rows))
    print(f"\n{same:.0%} of the answers are the same, {given.rounds} rounds")
    if given.json:
        given.json.write_text(json.dumps({"same": same, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
