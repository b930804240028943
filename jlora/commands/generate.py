"""`jlora generate` and `jlora chat`: a model, with an adapter or without, writes; text streams as it comes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

import jlora
from jlora.commands.settings import in_range, say, scheme
from jlora.data.chats import whole
from jlora.data.template import render, template_for
from jlora.data.tokens import prompt_ids, text_ids
from jlora.generate import GenerateConfig, generate_text, stream, writes
from jlora.io import Pretrained, load
from jlora.io.adapters import load_adapter
from jlora.methods.columns import reading


@dataclasses.dataclass(frozen=True)
class Writing:
    """What `generate` and `chat` share."""

    model: str
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    adapter: str | None = None
    """Folder of the adapter."""
    system: str | None = None
    """System message; only with a chat template."""
    chat_template: str | None = None
    """File of Jinja; without, the chat template beside the adapter, else the tokenizer's."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    seed: int = 0
    quantise: Literal["none", "nf4", "int8", "int4"] = "none"
    """Keep the base's linear weights in 8 or 4 bits: as the adapter was trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class GenerateCommand(Writing):
    """Write an answer to each prompt; a single one streams, but not under --json."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; without any, standard input is one, less the newline at its end."""
    beams: int = 1
    """More than 1: beam search, whose answer comes whole."""
    length_penalty: float = 1.0
    """Of beam search: scores are divided by length to this power."""
    raw: bool = False
    """Go on from the prompt's text as it is, as after training on prompts and completions, not by the chat template; so
    it is where the model has none."""
    json: tyro.conf.Suppress[bool] = False
    """Set by the command line's --json: an answer comes whole."""


@dataclasses.dataclass(frozen=True)
class ChatCommand(Writing):
    """Talk to a model in the terminal; an empty line or Ctrl-D ends."""


def settings(config: Writing) -> GenerateConfig:
    """The generation settings among a command's. Raises ValueError for a setting that no answer can come of."""
    in_range(config)
    if "" in config.stop:
        raise ValueError("stop = '': it ends every answer before it begins, leave it out")
    whole(config.system or "", "system")
    names = {field.name for field in dataclasses.fields(GenerateConfig)}
    return GenerateConfig(**{name: value for name, value in vars(config).items() if name in names})


def ready(config: Writing) -> tuple[Pretrained, Any]:
    """(model, params with the adapter); a prefix is part of the model. Raises ValueError for an encoder."""
    template = template_for(config.chat_template, config.adapter)
    base = load(config.model, dtype=jnp.dtype(config.dtype), quantise=scheme(config.quantise))
    if not writes(base.model):
        raise ValueError(f"{config.model} is an encoder: it writes no text")
    if base.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer")
    base = base.speaking(template)
    if config.adapter is None:
        return base, base.params
    frozen, lora, _ = load_adapter(base, config.adapter)
    tuned = dataclasses.replace(base, model=reading(base.model, frozen, lora))
    return tuned, jlora.combine(frozen, lora)


def rendered(base: Pretrained, messages: list[dict[str, str]]) -> list[int]:
    """A conversation's tokens, ready for the model's turn. Raises ValueError without a chat template."""
    if not base.tokenizer.chat_template:
        raise ValueError(f"{base.source} has no chat template, so it cannot chat: use generate")
    return text_ids(base.tokenizer, render(base.tokenizer, messages, True, base.source))


def opening(config: Writing) -> list[dict[str, str]]:
    """The messages before the user's first."""
    return [{"role": "system", "content": config.system}] if config.system is not None else []


def generate_command(config: GenerateCommand) -> dict[str, Any] | None:
    """{answers}; without `json` a single prompt's text goes to stdout as it comes, and None is returned."""
    how = settings(config)
    prompts = config.prompts or (sys.stdin.read().removesuffix("\n"),)
    for n, text in enumerate(prompts, 1):
        whole(text, f"prompt {n}")
    base, params = ready(config)
    how = dataclasses.replace(how, end=base.ends)
    if config.raw or not base.tokenizer.chat_template:
        if config.system is not None:
            lacking = "raw takes none" if config.raw else f"{base.source} has none"
            raise ValueError(f"system is a message of a chat template, and {lacking}: leave it out")
        rows = [prompt_ids(base.tokenizer, text) for text in prompts]
    else:
        rows = [rendered(base, [*opening(config), {"role": "user", "content": text}]) for text in prompts]
    key = jax.random.key(config.seed)
    if len(rows) == 1 and how.beams == 1 and not config.json:
        write(base, params, rows[0], how, config, key)
        return None
    answers = generate_text(base.model, params, base.tokenizer, rows, how, stop=config.stop, key=key)
    return {"answers": answers}


def write(base: Pretrained, params: Any, prompt: list[int], how: GenerateConfig, config: Writing, key: Any) -> str:
    """Stream one answer to stdout; returns it."""
    text = ""
    for piece in stream(base.model, params, base.tokenizer, prompt, how, stop=config.stop, key=key):
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text


def chat_command(config: ChatCommand) -> None:
    """A conversation; every turn is read again with all before it."""
    how = settings(config)
    base, params = ready(config)
    how = dataclasses.replace(how, end=base.ends)
    messages = opening(config)
    key = jax.random.key(config.seed)
    say("an empty line or Ctrl-D ends")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        key, draw = jax.random.split(key)
        answer = write(base, params, rendered(base, messages), how, config, draw)
        messages.append({"role": "assistant", "content": answer})
