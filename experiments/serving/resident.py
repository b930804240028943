"""A thousand adapters in memory and more on disk, on the real model, through the engine.

    python experiments/serving/resident.py [--resident 1000] [--more 100] [--check 4] [--json FILE]

SmolLM2-135M, float32, adapters of random factors, rank 4 on q and v (0.9 MB each), written in PEFT's format. A request
for each of the resident ones fills the bank; then `more` others make room for themselves, and some of both, one that
had made room included, are asked for 12 tokens at once. Answers are compared with `generate`'s; what was compiled
after the first few requests, and the process's peak memory, are printed.
"""

from __future__ import annotations

import argparse
import json
import queue
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from jlora.bank import bank as bank_module
from jlora.generate import GenerateConfig, generate, pad_left
from jlora.io import load
from jlora.io.adapters import load_adapter
from jlora.io.peft import save_peft
from jlora.serve import slots
from jlora.serve.engine import Engine
from jlora.serve.request import Ask

CONFIG = jlora.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
TEXT = "The film begins in a small town by the sea, where"


def written(base: Any, folder: Path, count: int) -> list[Path]:
    """`count` adapters that change what is written."""
    shapes = jax.eval_shape(lambda: jlora.lorafy(base.params, config=CONFIG, layouts=base.layouts)[1])
    out = []
    for n in range(count):
        draw = np.random.default_rng(n)
        lora = jax.tree.map(lambda like, draw=draw: draw.normal(0, 0.08, like.shape).astype(np.float32), shapes)
        out.append(save_peft(folder / f"adapter-{n}", lora, CONFIG, base.tensors, base.source))
    return out


def asked(engine: Engine, tokens: list[int], names: list[str], count: int) -> list[list[int]]:
    """The answers of these adapters, of `count` tokens; as many requests at a time as may wait."""
    out: list[list[int]] = []
    for start in range(0, len(names), engine.most_waiting):
        ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
        emit = lambda event, ends=ends: ends.put(event) if event.finish else None
        part = [
            engine.submit(Ask(tuple(tokens), engine.shelf.held[name], count, ignore_eos=True), emit)
            for name in names[start : start + engine.most_waiting]
        ]
        for _ in part:
            event = ends.get()
            assert event.finish == "length", event
        out += [request.new for request in part]
    return out


def compiled() -> dict[str, int]:
    held = {name: getattr(slots, name) for name in ("decode", "prefill", "seat", "resized")}
    return {name: run._cache_size() for name, run in {**held, "write": bank_module.write}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resident", type=int, default=1000)
    parser.add_argument("--more", type=int, default=100)
    parser.add_argument("--check", type=int, default=4, help="answers compared")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    base = load("smollm2-135m-instruct", scan_layers=jax.default_backend() != "cpu")
    tokens = base.tokenizer(TEXT)["input_ids"]
    with tempfile.TemporaryDirectory() as place:
        folders = written(base, Path(place), given.resident + given.more)
        names = [folder.name for folder in folders]
        engine = Engine(base, slots=8, max_length=64, adapters=given.resident, rank=4, merge_after=0)
        for folder in folders:
            engine.shelf.put(folder.name, folder)
        engine.start()
        asked(engine, tokens, names[:9], 12)
        asked(engine, tokens, names[:1], 2)  # a prompt alone
        before, used = compiled(), time.process_time()
        asked(engine, tokens, names[: given.resident], 1)
        filled = time.process_time() - used
        resident = len(engine.shelf.bank)
        asked(engine, tokens, names[given.resident :], 1)
        gone = [name for name in names if engine.shelf.held[name] not in engine.shelf.bank]
        some = np.random.default_rng(0).choice(names, 7, replace=False).tolist()
        wanted = [gone[0], *some]
        answers = asked(engine, tokens, wanted, 12)
        after = compiled()
        engine.stop()
        same = 0
        for name, answer in list(zip(wanted, answers, strict=True))[: given.check]:
            frozen, lora, _ = load_adapter(base, Path(place) / name)
            config = GenerateConfig(max_new_tokens=12, end=())
            want = generate(base.model, jlora.combine(frozen, lora), *pad_left([tokens]), config)[0]
            same += answer == want
    report = {
        "resident": resident,
        "offered": len(names),
        "made room": len(gone),
        "answers compared": given.check,
        "the same": same,
        "different answers among": f"{len({tuple(a) for a in answers})} of {len(answers)}",
        "compiled meanwhile": {name: after[name] - before[name] for name in after},
        "cpu seconds a request that reads its adapter from disk": round(filled / max(given.resident - 9, 1), 3),
        "peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
