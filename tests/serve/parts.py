"""A small base on disk with three adapters, an engine over it, and asking it."""

from __future__ import annotations

import dataclasses
import queue

import jax

import jlora
from jlora.generate import GenerateConfig, generate, pad_left
from jlora.io.adapters import load_adapter
from jlora.io.load import load
from jlora.io.peft import save_peft
from jlora.serve.request import Ask
from tests.small import small_model

NAMES = ("film", "news", "tweets")
PROMPTS = [(5, 6, 7), (3, 9, 11, 4, 8, 8, 3), (12,), (7, 7, 7, 7), (13, 5)]


def adapter(params, layouts, seed, rank=4):
    _, lora = jlora.lorafy(params, rank, alpha=8.0, key=jax.random.key(seed), layouts=layouts)
    keys = iter(jax.random.split(jax.random.key(seed + 100), 99))
    random = lambda e: dataclasses.replace(e, lora_b=0.5 * jax.random.normal(next(keys), e.lora_b.shape))
    return jax.tree.map(random, lora, is_leaf=lambda e: isinstance(e, jlora.lora.LoraFactors))


def made(folder):
    """(base, folder of adapters)."""
    base = load(small_model(folder / "base"))
    for n, name in enumerate(NAMES):
        save_peft(
            folder / "adapters" / name,
            adapter(base.params, base.layouts, n, 2 + n),
            jlora.LoraConfig(r=2 + n, lora_alpha=8),
            base.tensors,
            "small",
        )
    return base, folder / "adapters"


def offline(base, folder, prompt, count, ignore_eos=False):
    """What `generate` writes after a prompt, by itself."""
    params = base.params
    if folder is not None:
        frozen, lora, _ = load_adapter(base, folder)
        params = jlora.combine(frozen, lora)
    config = GenerateConfig(max_new_tokens=count, end=() if ignore_eos else (base.tokenizer.eos_token_id,))
    return generate(base.model, params, *pad_left([prompt]), config)[0]


class Asked:
    """A request submitted to an engine."""

    def __init__(self, engine, prompt, adapter=None, timeout=60.0, **settings):
        self.events = queue.SimpleQueue()
        held = engine.shelf.held[adapter] if adapter else None
        self.request = engine.submit(Ask(tuple(prompt), held, **settings), self.events.put, timeout)

    def wait(self):
        """(text, finish) once it is over."""
        text = ""
        while True:
            event = self.events.get(timeout=60)
            text += event.text
            if event.finish:
                return text, event.finish
