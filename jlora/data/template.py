"""A model's chat template, rendered in a bounded sandbox: it comes with the model, from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jlora.io.text import one_line


def render(tokenizer: Any, messages: Sequence[Any], prompt: bool, where: str = "") -> str:
    """The conversation as text; prompt: with the opening of the model's turn.

    where: what the error begins with. Raises ValueError without a template, and for one that fails, reaches for what
    the sandbox keeps from it or asks for more than it grants (`data/sandbox.py`).
    """
    from jlora.data.sandbox import rendered

    lead = f"{where}: " if where else ""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if not template:
        raise ValueError(f"{lead}the tokenizer has no chat template")
    if not isinstance(template, str):
        raise ValueError(f"{lead}the chat template is a {type(template).__name__}, not text")
    values = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": prompt}
    try:
        return rendered(template, **{**tokenizer.special_tokens_map, **values})
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(f"{lead}the chat template fails: {type(error).__name__}: {one_line(error)}") from None
