"""Generation: a prompt read once into a cache, then a token a step; greedy or sampled, in batches, as text or a stream.

Axes: b batch, p prompt, t all tokens (prompt and room for new ones), n new tokens, v vocabulary. Prompts are padded on
the left, so the last column is every prompt's last token. `params` may hold implicit leaves (`jlora.combine`): swapping
an adapter compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.data.tokens import prompt_ids
from jlora.lift import lift
from jlora.models.attention import attending, fitting
from jlora.models.causal import to_length
from jlora.sampling import choose, forbid
from jlora.serve.request import Ask, Event, Request, cut


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How tokens are chosen; names and meaning as in transformers' generation."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Choose among the k most likely; 0: all."""
    top_p: float = 1.0
    """Choose among the most likely that make up this probability."""
    min_p: float = 0.0
    """Choose among those at least this fraction as likely as the best."""
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    """No n tokens in a row twice; 0: no limit. (The paper's NLG experiments: 4.)"""
    beams: int = 1
    """Beam search over this many; sampling settings do not apply. (The paper's: 10.)"""
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power. (The paper's: 0.9.)"""
    end: tuple[int, ...] = ()
    """Tokens that end an answer."""

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": self.max_new_tokens < 1,
            "temperature": self.temperature < 0,
            "top_k": self.top_k < 0,
            "top_p": not 0 < self.top_p <= 1,
            "min_p": not 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty <= 0,
            "no_repeat_ngram": self.no_repeat_ngram < 0,
            "beams": self.beams < 1,
        }
        for name in (name for name, bad in wrong.items() if bad):
            raise ValueError(f"{name} = {getattr(self, name)} is out of its range")


class Decoding(NamedTuple):
    """What a step changes: tokens i32 [b, t], which are real [b, t], columns filled, ended [b], next logits [b, v]."""

    tokens: jax.Array
    real: jax.Array
    length: jax.Array
    ended: jax.Array
    logits: jax.Array
    cache: Any
    key: jax.Array


def start(model: Any, room: int, params: Any, tokens: jax.Array, mask: jax.Array, key: jax.Array) -> Decoding:
    """Read prompts i32 [b, p], mask [b, p], into a cache with `room` for new tokens."""
    batch, prompt = tokens.shape
    logits, cache = read(model, room, params, tokens, mask)
    widen = lambda x: jnp.pad(x, ((0, 0), (0, room)))
    return Decoding(
        widen(tokens), widen(mask), jnp.asarray(prompt), jnp.zeros(batch, bool), logits, cache, jnp.asarray(key)
    )


def read(model: Any, room: int, params: Any, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    """(logits f32 [b, v] after prompts i32 [b, p], mask [b, p]; their cache, with room for new tokens)."""
    with attending(fitting("any")):
        logits, cache = forward(model, params, tokens, mask, model.init_cache(*tokens.shape))
    size = cache["mask"].shape[-1] + room  # a prefix has columns of its own before the prompt
    kv = jax.tree.map(lambda x: to_length(x, -2, size), cache["kv"])
    return logits, {**cache, "kv": kv, "mask": to_length(cache["mask"], -1, size)}


def forward(model: Any, params: Any, tokens: jax.Array, mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """(logits f32 [b, v] after the last column, cache)."""
    apply = lift(model.apply)
    hidden, cache = apply({"params": params}, tokens, mask=mask, cache=cache, method="hidden")
    return apply({"params": params}, hidden[:, -1], method="head"), cache


def step(model: Any, config: GenerateConfig, params: Any, s: Decoding) -> Decoding:
    """Choose a token a row, and run the model on it. An ended row gets its end token again, and stays ended."""
    key, draw = jax.random.split(s.key)
    scores = forbid(s.logits, s.tokens, s.real, s.length, config)
    new = choose(scores, draw, config).astype(s.tokens.dtype)
    if config.end:
        new = jnp.where(s.ended, config.end[0], new)
    tokens = jax.lax.dynamic_update_slice(s.tokens, new[:, None], (0, s.length))
    real = jax.lax.dynamic_update_slice(s.real, ~s.ended[:, None], (0, s.length))
    ended = s.ended | jnp.isin(new, jnp.asarray(config.end, new.dtype)) if config.end else s.ended
    logits, cache = forward(model, params, new[:, None], jnp.ones((len(new), 1), bool), s.cache)
    return Decoding(tokens, real, s.length + 1, ended, logits, cache, key)


start_jit = jax.jit(start, static_argnums=(0, 1))
step_jit = jax.jit(step, static_argnums=(0, 1), donate_argnums=3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    model: Any, config: GenerateConfig, params: Any, tokens: jax.Array, mask: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(new tokens i32 [b, n], which are real bool [b, n])."""
    state = start(model, config.max_new_tokens, params, tokens, mask, key)
    size = state.tokens.shape[1]
    state = jax.lax.while_loop(
        lambda s: (s.length < size) & ~jnp.all(s.ended), functools.partial(step, model, config, params), state
    )
    return state.tokens[:, tokens.shape[1] :], state.real[:, tokens.shape[1] :]


def generate(
    model: Any, params: Any, tokens: Any, mask: Any, config: GenerateConfig, key: Any = None
) -> list[list[int]]:
    """The new tokens of each row, its end token included. tokens i32 [b, p], mask bool [b, p], padded on the left.

    key: PRNG key, needed above temperature 0. Raises ValueError without it, for padding on the right, for an encoder,
    or for more tokens than the model has positions.
    """
    if config.temperature and config.beams == 1 and key is None:
        raise ValueError("temperature above 0 needs key=: a PRNG key")
    mask = np.asarray(mask, bool)
    if not mask[:, -1].all():
        raise ValueError("prompts are padded on the left: the last column of mask must be all True")
    within_positions(model, int(mask.sum(axis=1).max()), config.max_new_tokens)
    key = jax.random.key(0) if key is None else key
    if config.beams > 1:
        from jlora.beam import beam_search

        new, real = beam_search(model, config, params, jnp.asarray(tokens), jnp.asarray(mask))
    else:
        new, real = run(model, config, params, jnp.asarray(tokens), jnp.asarray(mask), key)
    return [row[keep].tolist() for row, keep in zip(np.asarray(new), np.asarray(real), strict=True)]


def writes(model: Any) -> bool:
    """Whether it is a decoder, with a prefix or without."""
    return hasattr(getattr(model, "model", model), "init_cache")


def most_tokens(model: Any) -> int | None:
    """How many tokens a table of positions has rows for (GPT-2's), less the columns of a prefix; None: no table."""
    inner, columns = getattr(model, "model", model), getattr(model, "n", 0)
    rows = getattr(getattr(inner, "config", None), "n_positions", None)
    return None if rows is None else rows - columns


def within_positions(model: Any, prompt: int, new: int) -> None:
    """Raises ValueError for an encoder, and for more tokens than the model has positions: what is read past them is
    NaN."""
    if not writes(model):
        raise ValueError(f"{type(model).__name__} is an encoder: it writes no text")
    most = most_tokens(model)
    if most is not None and prompt + new > most:
        raise ValueError(
            f"{prompt} prompt tokens and {new} new ones are more than the model's {most} positions: shorten the prompt "
            "or lower max_new_tokens"
        )


def pad_left(rows: Sequence[Sequence[int]], multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(tokens i32 [b, p], mask bool [b, p]); p a multiple of `multiple`, so that few shapes are compiled."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for n, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {n} has no tokens: start it with a begin token")
        tokens[n, width - len(row) :], mask[n, width - len(row) :] = row, True
    return tokens, mask


def ends(config: GenerateConfig, tokenizer: Any) -> GenerateConfig:
    """`config` with the tokenizer's end token where it names none (`Pretrained.ends` knows a checkpoint's others)."""
    eos = tokenizer.eos_token_id
    return config if config.end or eos is None else dataclasses.replace(config, end=(int(eos),))


def generate_text(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    config: GenerateConfig,
    *,
    stop: Sequence[str] = (),
    key: Any = None,
) -> list[str]:
    """What is written after each prompt, without special tokens, cut before the first `stop` string. A prompt is a
    text, read as in training, or its tokens."""
    config = ends(config, tokenizer)
    rows = [prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    if stop and config.beams == 1:
        keys = [None if key is None else jax.random.fold_in(key, n) for n in range(len(rows))]
        alone = lambda row, own: "".join(stream(model, params, tokenizer, row, config, stop=stop, key=own))
        return list(map(alone, rows, keys))
    new = generate(model, params, *pad_left(rows), config, key)
    return [cut(tokenizer.decode(row, skip_special_tokens=True), tuple(stop), 0)[0] for row in new]


def stream(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    config: GenerateConfig,
    *,
    stop: Sequence[str] = (),
    key: Any = None,
) -> Iterator[str]:
    """Text as it is written after the tokens `prompt`; ends at an end token, a `stop` string or the limit."""
    config = ends(config, tokenizer)
    if config.temperature and key is None:
        raise ValueError("temperature above 0 needs key=: a PRNG key")
    tokens, mask = pad_left([prompt])
    within_positions(model, len(prompt), config.max_new_tokens)
    key = jax.random.key(0) if key is None else key
    state = start_jit(model, config.max_new_tokens, params, tokens, mask, key)
    pieces: list[Event] = []
    request = Request(Ask(tuple(prompt), max_tokens=config.max_new_tokens, stop=tuple(stop)), pieces.append)
    while not request.finish:
        state = step_jit(model, config, params, state)
        token = int(state.tokens[0, tokens.shape[1] + len(request.new)])
        request.take(token, tokenizer, frozenset(config.end), False)
        yield from (event.text for event in pieces if event.text)
        pieces.clear()
