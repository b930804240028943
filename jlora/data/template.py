"""A model's chat template, rendered in a bounded sandbox: it comes with the model, from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.io.beside import put
from jlora.io.text import one_line

FILE = "chat_template.jinja"
"""Beside an adapter the template that it was trained with, where that is not the model's own; transformers' name."""


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


def template_for(file: str | None, adapter: str | Path | None) -> str | None:
    """The chat template to use in place of the tokenizer's: that of a file, else the one beside the adapter, if any.
    Raises what `read_template` raises."""
    beside = Path(adapter or "") / FILE
    if file is None and not (adapter and beside.exists()):
        return None
    return read_template(beside if file is None else file)


def write_template(folder: Path, template: str | None) -> None:
    """Write an adapter's chat template beside it; where it has none, none of an earlier one is left there."""
    if template is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        put(folder / FILE, template.encode())


def read_template(path: str | Path) -> str:
    """The chat template of a file. Raises FileNotFoundError, and ValueError where it is none."""
    from jlora.data.sandbox import LONGEST, compiled

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a chat template is a file of Jinja ({FILE})")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read(LONGEST + 1)
        if not text.strip() or len(text) > LONGEST:
            raise ValueError("it is empty" if len(text) <= LONGEST else f"it has more than {LONGEST:,} characters")
        compiled(text)
    except OSError:
        raise
    except Exception as error:  # whatever Jinja meets in there
        line = getattr(error, "lineno", None)
        told = one_line(error) + (f" at line {line}" if line else "")
        raise ValueError(f"{path}: not a chat template: {told}") from None
    return text
