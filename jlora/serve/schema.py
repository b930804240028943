"""OpenAI's request bodies as `Ask`s, and the answers' JSON. What is not supported is refused, never ignored.

Names and defaults: https://platform.openai.com/docs/api-reference; top_k, min_p and ignore_eos as in vLLM.
A field is read, or has a value that asks for nothing, or does not bear on the answer; any other is refused.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping
from typing import Any

from jlora.data.chats import Message, turns
from jlora.data.files import DataError
from jlora.data.template import render
from jlora.data.tokens import prompt_ids, text_ids
from jlora.serve.request import Ask

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "ignore_eos")
READ = {"model", "max_tokens", "max_completion_tokens", "stream", "stream_options", *SAMPLING}
"""And `messages` or `prompt`."""

NAMING = ("user", "metadata", "store", "service_tier", "safety_identifier", "request_id")
CACHING = ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_salt")
HARMLESS = {*NAMING, *CACHING, "priority", "prediction", "parallel_tool_calls"}
"""What names, files or hastens a request; parallel_tool_calls is about tools, which are refused themselves."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),  # 0 asks for those of the chosen tokens
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    # vLLM's
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
"""Fields that would change the answer, and the values under which they do not."""

MOST_STOPS, LONGEST_STOP = 8, 256


class BadRequest(ValueError):
    """What is wrong with a request; `param`: the field, `status` and `code` as OpenAI answers."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def read_object(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises BadRequest."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        held = json.loads(body, parse_constant=no_constant)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise BadRequest(f"the body is a JSON {type(held).__name__}; an object is expected")
    return held


def check_fields(body: Mapping[str, Any], chat: bool) -> None:
    """Raises BadRequest for a field that would change the answer and is not read; null counts as not given."""
    read = READ | {"messages" if chat else "prompt"}
    alike = lambda value, held: value == held and isinstance(value, bool) == isinstance(held, bool)
    for name, value in body.items():
        if value is None or name in read or name in HARMLESS:
            continue
        if not any(alike(value, held) for held in NEUTRAL.get(name, ())):
            raise BadRequest(f"{name[:60]} = {str(value)[:40]} is not supported here: leave it out", name[:60])


def number(body: Mapping[str, Any], name: str, default: Any, least: float, most: float, whole: bool = False) -> Any:
    """A field's number in [least, most]; null is the default. Raises BadRequest."""
    value = body.get(name)
    if value is None:
        return default
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        what = "a whole number" if whole else "a number"
        raise BadRequest(f"{name} must be {what} from {least:g} to {most:g}, got {str(value)[:40]}", name)
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, got {str(value)[:40]}", name)
    return bool(value)


def text_of(value: Any, name: str) -> str:
    """Raises BadRequest for anything but text that has a UTF-8 form (JSON can spell half of a surrogate pair)."""
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be text, got {type(value).__name__}", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name} holds half of a surrogate pair: it is not Unicode text", name) from None
    return value


def stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    held = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(held, list) or len(held) > MOST_STOPS:
        raise BadRequest(f"stop must be text or a list of at most {MOST_STOPS}", "stop")
    words = tuple(text_of(word, "stop") for word in held)
    if any(not 0 < len(word) <= LONGEST_STOP for word in words):
        raise BadRequest(f"a stop string has 1 to {LONGEST_STOP} characters", "stop")
    return words


def messages_of(body: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation, as rows of chats are read. Raises BadRequest."""
    held = body.get("messages")
    for n, message in enumerate(held if isinstance(held, list) else ()):
        if isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call")):
            raise BadRequest(f"messages[{n}] calls tools, which are not supported here: put it as text", "messages")
    try:
        return turns(held, "the request", "messages", learnt=False)
    except DataError as error:
        raise BadRequest(str(error), "messages") from None


def prompt_tokens(
    body: Mapping[str, Any], tokenizer: Any, chat: bool, vocabulary: int, most: float = math.inf
) -> list[int]:
    """The prompt's tokens, made as in training: a begin token only where the tokenizer adds one. Raises BadRequest.

    most: characters of a text; a longer one is refused untokenised, which for a megabyte would take seconds.
    """
    name = "messages" if chat else "prompt"

    def short(text: str) -> str:
        if len(text) > most:
            said = f"the prompt has {len(text)} characters; at most {most} can fit"
            raise BadRequest(said, name, code="context_length_exceeded")
        return text

    if chat:
        if not tokenizer.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions", "messages")
        messages = messages_of(body)
        try:
            text = render(tokenizer, messages, prompt=True)
        except ValueError as error:
            raise BadRequest(str(error), "messages") from None
        return text_ids(tokenizer, short(text))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not prompt or not all(type(token) is int and 0 <= token < vocabulary for token in prompt):
            raise BadRequest(f"prompt must be one text, or tokens from 0 to {vocabulary - 1}", "prompt")
        return prompt
    return prompt_ids(tokenizer, short(text_of(prompt, "prompt")))


def ask_of(body: Mapping[str, Any], tokens: list[int], adapter: Any, chat: bool, room: int) -> Ask:
    """The settings of a request whose prompt is read. room: tokens of prompt and answer together. Raises BadRequest."""
    if not tokens:
        raise BadRequest("the prompt is empty", "messages" if chat else "prompt")
    left = room - len(tokens)
    if left < 1:
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens; with one of the answer at most {room} fit",
            "messages" if chat else "prompt",
            code="context_length_exceeded",
        )
    # chat: as much as fits, /v1/completions: 16, as OpenAI's
    named = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    count = number(body, named, left if chat else min(16, left), 1, 2**31, whole=True)
    if count > left:
        raise BadRequest(
            f"{len(tokens)} prompt tokens and {named} = {count} are more than the {room} that fit",
            named,
            code="context_length_exceeded",
        )
    seed = number(body, "seed", None, -(2**63), 2**64, whole=True)
    return Ask(
        tuple(tokens),
        adapter,
        max_tokens=count,
        temperature=float(number(body, "temperature", 1.0, 0, 100)),
        top_k=max(number(body, "top_k", 0, -1, 2**31 - 1, whole=True), 0),  # -1 is vLLM's "all"
        top_p=float(number(body, "top_p", 1.0, 1e-6, 1)),
        min_p=float(number(body, "min_p", 0.0, 0, 1)),
        seed=secrets.randbits(32) if seed is None else seed,
        stop=stops(body),
        ignore_eos=flag(body, "ignore_eos"),
    )


def error_json(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    # what a client sent may hold half of a surrogate pair, which no answer can
    said = message.encode(errors="replace").decode()
    param = param and param.encode(errors="replace").decode()
    return {"error": {"message": said, "type": kind, "param": param, "code": code}}


class Answer:
    """The JSON of one answer, whole or in pieces."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int) -> None:
        self.chat, self.prompt = chat, prompt_tokens
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"}
        self.tail = {"created": int(time.time()), "model": model}

    def usage(self, new: int) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": new, "total_tokens": self.prompt + new}

    def whole(self, text: str, finish: str, new: int) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self.head, "object": kind, **self.tail, "choices": [choice], "usage": self.usage(new)}

    def piece(self, text: str | None, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        """text None: no more of it."""
        delta = {"role": "assistant"} if first else {}
        said: dict[str, Any] = {"delta": {**delta, **({} if text is None else {"content": text})}}
        choice = {"index": 0, **(said if self.chat else {"text": text or ""}), "logprobs": None}
        return {**self.head, "object": self.kind, **self.tail, "choices": [{**choice, "finish_reason": finish}]}

    def last(self, new: int) -> dict[str, Any]:
        """The piece of `stream_options: {include_usage: true}`."""
        return {**self.head, "object": self.kind, **self.tail, "choices": [], "usage": self.usage(new)}

    @property
    def kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"
