"""A model's chat template, rendered in a bounded sandbox: it comes with the model, from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jlora.io.text import one_line


def render(tokenizer: Any, messages: Sequence[Any], prompt: bool, where: str = "", tools: Sequence[Any] = ()) -> str:
    """The conversation as text, of which `marks_of` tells the model's words; prompt: with the opening of its turn.

    where: what the error begins with. tools: JSON schemas of what the model may call.
    Raises ValueError without a template, and for one that fails, reaches for what the sandbox keeps from it or asks for
    more than it grants (`data/sandbox.py`).
    """
    from jlora.data.sandbox import rendered

    lead = f"{where}: " if where else ""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = template.get("tool_use" if tools and "tool_use" in template else "default")
    if not template:
        raise ValueError(f"{lead}the tokenizer has no chat template")
    if not isinstance(template, str):
        raise ValueError(f"{lead}the chat template is a {type(template).__name__}, not text")
    values = {"messages": list(messages), "tools": list(tools) or None, "documents": None}
    try:
        return rendered(template, **{**tokenizer.special_tokens_map, **values, "add_generation_prompt": prompt})
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(f"{lead}the chat template fails: {type(error).__name__}: {one_line(error)}") from None
