"""Jinja for chat templates of unknown origin: bounded in steps, in the size of every value and in what it reaches.

A template comes with a model and is a program. Jinja's own sandbox keeps it from files and from Python's internals, but
lets it loop and double a text as long as it likes. Here each turn of a loop, each call and filter, and every value that
is made costs steps, and values are weighed before and after each operation that could make a larger one. Globals,
`tojson` and `{% generation %}` are those that transformers gives to templates.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
import types
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jlora.data.marks import Generation, Marked, marks_of, put_together

LONGEST = 1 << 17
"""Characters of a template."""
STEPS = 500_000
"""Of one rendering."""
LARGEST = 1 << 22
"""Characters and items in one value, what it holds included."""
PRODUCT = 1 << 26
"""Of the two largest operands of a call, whose result may be as large as that before it is weighed."""
CHEAP = ("count", "d", "default", "first", "last", "length")
"""Filters that look at no more than the value's length or one item."""
DROPPED = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters whose time is not bounded by the size of what they read; no chat template needs them."""
SIZED = str | bytes | dict | list | tuple | set | frozenset | range | KeysView | ValuesView | ItemsView
TOO_LARGE = f"it makes a value of more than {LARGEST:,} characters or items"

budget: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps left")


class TooMuch(jinja2.TemplateError):
    """The template asks for more than it may."""


def spend(steps: int = 1) -> None:
    """Raises TooMuch."""
    left = budget.get()
    left[0] -= steps
    if left[0] < 0:
        raise TooMuch(f"it takes more than {STEPS:,} steps")


def weigh(value: Any) -> int:
    """Characters and items in a value, all that it holds counted as often as it is printed; paid for in steps.

    Raises TooMuch above LARGEST, and for a namespace, of which cycles could be made.
    """
    size, items, rest = 0, 0, [value]
    while rest:
        one = rest.pop()
        items += 1
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, int):
            size += one.bit_length() // 64
        elif isinstance(one, SIZED):
            if len(one) + len(rest) > LARGEST:
                raise TooMuch(TOO_LARGE)
            rest += [*one, *one.values()] if isinstance(one, dict) else list(one)
        elif isinstance(one, Namespace):
            raise TooMuch("it uses a namespace as a value")
        if size + items > LARGEST:
            raise TooMuch(TOO_LARGE)
    spend((size >> 8) + (items >> 2))
    return size + items


def held(value: Any) -> Any:
    """The value, weighed; what is made on demand is made now."""
    if isinstance(value, types.GeneratorType | map | zip | filter | reversed):
        value = list(counted(value))
    if not isinstance(value, Namespace):
        weigh(value)
    return value


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values, a step each."""
    for value in values:
        spend()
        yield held(value)


def joined(parts: list[Any]) -> str:
    """`~`."""
    weigh(parts)
    texts = [str(part) for part in parts]
    weigh(texts)
    return "".join(texts)


def concat(pieces: Iterable[str]) -> str:
    """What is written, by the template or a part of it."""
    out, total = [], 0
    for piece in pieces:
        total += len(piece)
        if total > LARGEST:
            raise TooMuch(f"it writes more than {LARGEST:,} characters")
        out.append(piece)
    spend(1 + (total >> 8))
    return put_together(out)


def printed(value: Any) -> Any:
    """What `{{ }}` is about to write: its text is about as large as the value."""
    if not isinstance(value, str):
        weigh(value)
    return value


def operands(values: Iterable[Any]) -> None:
    """Weigh what a call gets. Raises TooMuch where the product of two, which a result may be as large as, is."""
    sizes = [1, 1, *(abs(v) if isinstance(v, int) else weigh(v) for v in values if isinstance(v, int | SIZED))]
    sizes.sort()
    spend(sizes[-1] >> 5)
    if sizes[-1] > LARGEST or sizes[-1] * sizes[-2] > PRODUCT:
        raise TooMuch(TOO_LARGE)


def guarded(run: Any, least: int = 1) -> Any:
    """A filter or test whose operands, if `least` or more, and result are weighed."""

    @functools.wraps(run)  # keeps Jinja's marks of what else it is called with
    def guard(*given: Any, **named: Any) -> Any:
        spend()
        if len(given) + len(named) >= least:
            operands((*given, *named.values()))
        if run is FILTERS["format"]:
            plain_format(given[0])
        return held(run(*given, **named))

    return guard


def plain_format(text: Any, braces: bool = False) -> None:
    """Raises TooMuch for a format that pads to a width of many digits, or to one that is computed."""
    if re.search(r"[:{][^{}]*[0-9]{5}|\{[^{}]*\{" if braces else r"%[^a-zA-Z%]*([0-9]{5}|\*)", str(text)):
        raise TooMuch("it pads to a width that is too large, or computed")


class Bounds(NodeTransformer):
    """Puts `held`, `counted` and `joined` where Jinja offers no hook."""

    def wrap(self, name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> Any:
        self.generic_visit(node)
        node.iter = self.wrap("jlora_counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return self.wrap("jlora_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        node.expr = self.wrap("jlora_held", node.expr)
        for operand in node.ops:
            operand.expr = self.wrap("jlora_held", operand.expr)
        return node

    def visit_made(self, node: Any) -> Any:
        """A list, dict or slice: a value that may hold another many times."""
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self.wrap("jlora_held", node)

    visit_List = visit_Tuple = visit_Dict = visit_made

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        return self.visit_made(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates, bounded. Used within `rendered`, which grants the steps."""

    intercepted_binops: frozenset[str] = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(concat)

    def __init__(self) -> None:
        # not optimized: what is constant would be computed while compiling
        how = {"trim_blocks": True, "lstrip_blocks": True, "optimized": False, "finalize": printed}
        super().__init__(extensions=[Generation, loopcontrols], **how)
        kept = {name: run for name, run in {**FILTERS, "tojson": tojson}.items() if name not in DROPPED}
        self.filters = {name: run if name in CHEAP else guarded(run) for name, run in kept.items()}
        self.filters |= {"jlora_held": held, "jlora_counted": counted, "jlora_joined": joined}
        self.tests = {name: guarded(run, 2) for name, run in self.tests.items()}
        self.globals = {"range": self.globals["range"], "dict": mapping, "namespace": Names}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        spend()
        both = [left, right]
        for value in both:
            weigh(value)
        if operator == "*" and not all(isinstance(value, int | float) for value in both):
            number = next((value for value in both if isinstance(value, int)), 1)
            if number * sum(len(value) for value in both if isinstance(value, str | list | tuple)) > LARGEST:
                raise TooMuch(TOO_LARGE)
        if operator == "**" and all(isinstance(v, int) for v in both) and left.bit_length() * right > 1 << 12:
            raise TooMuch("it makes a number of more than 4,096 bits")
        if operator == "%" and isinstance(left, str):
            plain_format(left)
        return held(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *given: Any, **named: Any) -> Any:
        spend()
        if isinstance(obj, LoopContext):  # a recursive loop goes into its values
            given = tuple(counted(value) for value in given)
        elif obj is not Names and not isinstance(obj, Macro):
            operands((getattr(obj, "__self__", None), *given, *named.values()))
        return held(super().call(context, obj, *given, **named))

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` and `format_map`, when a template takes hold of them."""
        found = super().wrap_str_format(value)
        if found is not None:
            plain_format(value.__self__, braces=True)
        return found


class Names(Namespace):
    """`namespace()`; attributes that begin with "_" are refused, as by transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *others = args
        given = dict(*others, **kwargs)
        for name in given:
            Names.check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        Names.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")


def mapping(*given: Any, **named: Any) -> dict[Any, Any]:
    """In place of the class `dict`, of which a template sees too much."""
    return dict(*given, **named)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the escapes for HTML of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    sandbox = Sandbox()
    return sandbox.from_string(Bounds().visit(sandbox.parse(template)))


def rendered(template: str, **values: Any) -> str:
    """The text of a template, `Marked` where the template has `{% generation %}`. Raises TooMuch, and whatever else the
    template, being a program, raises."""
    if len(template) > LONGEST:
        raise TooMuch(f"it has {len(template):,} characters, more than {LONGEST:,}")
    token = budget.set([STEPS])
    try:
        weigh(values)
        made = compiled(template)
        text = made.render(**values)
        environment: Any = made.environment
        return Marked(text, marks_of(text) or ()) if environment.marking else text
    finally:
        budget.reset(token)
