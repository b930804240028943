"""A model's chat template, rendered by transformers in Jinja's sandbox: it comes with the model, from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jlora.io.text import one_line


def render(tokenizer: Any, messages: Sequence[Any], prompt: bool, where: str = "") -> str:
    """The conversation as text; prompt: with the opening of the model's turn.

    where: what the error begins with. Raises ValueError without a template, and for one that fails or reaches for
    what the sandbox keeps from it.
    """
    lead = f"{where}: " if where else ""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{lead}the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(f"{lead}the chat template fails: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(text, str):
        raise ValueError(f"{lead}the chat template gives a {type(text).__name__}, not text")
    return text
