"""`{% generation %}` of chat templates, which marks the model's own words, as in transformers: where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension

Span = tuple[int, int]


class Marked(str):
    """A text with `marks`: where the model's words begin and end in it, in order."""

    marks: tuple[Span, ...]

    def __new__(cls, text: str, marks: Iterable[Span] = ()) -> Marked:
        made = super().__new__(cls, text)
        made.marks = tuple(marks)
        return made

    def __str__(self) -> str:
        return self  # `{{ }}` writes a macro's text by `str`


def marks_of(text: str) -> tuple[Span, ...] | None:
    """None for the text of a template that marks nothing."""
    return text.marks if isinstance(text, Marked) else None


def put_together(pieces: Sequence[str]) -> str:
    """The pieces as one text, with the marks that they have."""
    text, marks, at = "".join(pieces), [], 0
    for piece in pieces:
        marks += [(at + begin, at + end) for begin, end in marks_of(piece) or ()]
        at += len(piece)
    return Marked(text, marks) if marks else text


class Generation(Extension):
    """The block; `environment.marking`: whether a template has one."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        environment.marking = False

    def parse(self, parser: Any) -> Any:
        parser.environment.marking = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        text = caller()
        return Marked(text, [(0, len(text))])
