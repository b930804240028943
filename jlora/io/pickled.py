"""Pickles of tensors read by a stack machine that knows data and nothing else.

A pickle is a program: Python's own unpickler imports and calls what it names. Here nothing is imported and nothing is
called. Tables, lists, tuples, numbers and text are built; `collections.OrderedDict`, `torch.Size` and torch's way to
say "a tensor" are known by name; any other name or instruction is refused.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from pickle import UnpicklingError
from typing import IO, Any, NamedTuple


class Global(NamedTuple):
    """A name that the pickle asks for; it is never looked up."""

    module: str
    name: str


MARK = object()
MOST_STEPS = 1_000_000
"""A tensor takes about 60."""
DATA = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
DATA |= {"SHORT_BINSTRING", "BINSTRING"}
MADE: dict[str, Callable[[], Any]] = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
MADE |= {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "MARK": lambda: MARK}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(file: bytes | IO[bytes], known: Callable[[Global], Any], tensor: Any, storage: Any) -> Any:
    """The object of the one pickle at the start of `file`, which is left right after it.

    known(name): what a name stands for, or None. tensor(*args): of `torch._utils._rebuild_tensor_v2`.
    storage(*args): of a persistent id. Raises UnpicklingError for anything else, ValueError for a cut file.
    """
    machine = Machine(known, tensor, storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of an odd escape in a damaged file's text
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if count > MOST_STEPS:
                raise UnpicklingError(f"it has more than {MOST_STEPS} instructions")
            machine.step(opcode.name, arg)
    return machine.pop()


class Machine:
    """The stack and the memo."""

    def __init__(self, known: Callable[[Global], Any], tensor: Any, storage: Any) -> None:
        self.known, self.tensor, self.storage = known, tensor, storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[], None]] = {
            "TUPLE": lambda: self.push(tuple(self.marked())),
            "APPEND": lambda: self.extend([self.pop()]),
            "APPENDS": lambda: self.extend(self.marked()),
            "SETITEM": lambda: self.update([*reversed([self.pop(), self.pop()])]),
            "SETITEMS": lambda: self.update(self.marked()),
            "BINPERSID": lambda: self.push(self.storage(*self.arguments())),
            "STACK_GLOBAL": lambda: self.look_up(*reversed([self.pop(), self.pop()])),
            "REDUCE": self.reduce,
            "BUILD": self.drop,  # a table's attributes: no tensor is among them
        }

    def step(self, name: str, arg: Any) -> None:
        """One instruction."""
        if name in DATA:
            self.push(arg)
        elif name in MADE:
            self.push(MADE[name]())
        elif name in TUPLES:
            self.push(tuple(reversed([self.pop() for _ in range(TUPLES[name])])))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else arg] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if arg not in self.memo:
                raise UnpicklingError(f"it reads memo {arg}, which was never written")
            self.push(self.memo[arg])
        elif name == "GLOBAL":
            self.look_up(*arg.split(" ", 1))
        elif name in self.steps:
            self.steps[name]()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UnpicklingError(f"it holds the instruction {name}, which no table of weights needs")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if not self.stack:
            raise UnpicklingError("it takes from an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def drop(self) -> None:
        self.pop()
        self.top()

    def marked(self) -> list[Any]:
        """What lies above the last mark."""
        at = next((n for n in range(len(self.stack) - 1, -1, -1) if self.stack[n] is MARK), None)
        if at is None:
            raise UnpicklingError("it asks for a mark that was never set")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def arguments(self) -> tuple[Any, ...]:
        found = self.pop()
        if not isinstance(found, tuple):
            raise UnpicklingError(f"it calls with a {type(found).__name__}")
        return found

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.top(), list):
            raise UnpicklingError(f"it appends to a {type(self.top()).__name__}")
        self.top().extend(values)

    def update(self, pairs: list[Any]) -> None:
        table = self.top()
        if not isinstance(table, dict) or len(pairs) % 2:
            raise UnpicklingError(f"it sets items of a {type(table).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):  # hashing a tuple of tuples of tuples can take for ever
                raise UnpicklingError(f"a table has a {type(key).__name__} for a key")
            table[key] = value

    def look_up(self, module: Any, name: Any) -> None:
        asked = Global(str(module), str(name))
        built_in = (("collections", "OrderedDict"), ("torch", "Size"))
        built_in += (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"))
        found = asked if asked in built_in else self.known(asked)
        if found is None:
            raise UnpicklingError(f"it asks for {asked.module}.{asked.name}, which no table of weights needs")
        self.push(found)

    def reduce(self) -> None:
        args, asked = self.arguments(), self.pop()
        name = asked.name if isinstance(asked, Global) else None
        if name == "OrderedDict" and len(args) <= 1:
            self.push({})
            rows = args[0] if args else []
            if not isinstance(rows, list) or not all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
                raise UnpicklingError("a table is made of what are no pairs")
            self.update([x for row in rows for x in row])
        elif name == "_rebuild_tensor_v2":
            self.push(self.tensor(*args))
        elif name == "_rebuild_parameter" and args:
            self.push(args[0])
        elif name == "Size" and args and isinstance(args[0], list | tuple):
            self.push(tuple(args[0]))
        else:
            raise UnpicklingError(f"it calls a {name or type(asked).__name__} of {len(args)} values")
