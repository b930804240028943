"""Regexes that come with a file: they may be wrong, many, or made to take for ever, so they get one time budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import regex

from jlora.io.text import one_line

SECONDS = 1.0
LONGEST = 1000


class Patterns:
    """{pattern: value}; PEFT matches a pattern at the end of a module's name, the first that fits wins."""

    def __init__(self, held: Mapping[str, Any], where: object) -> None:
        """Raises ValueError for a pattern that is no regex."""
        self.where, self.left = where, SECONDS
        self.found = []
        for pattern, value in held.items():
            try:
                if len(pattern) > LONGEST:
                    raise ValueError(f"longer than {LONGEST} characters")
                self.found.append((regex.compile(rf"(.*\.)?({pattern})$"), value))
            except (regex.error, ValueError, RecursionError) as error:
                raise ValueError(f"{where}: pattern {pattern!r:.80} is no regex: {one_line(error)}") from None

    def first(self, module: str, default: Any) -> Any:
        """The value for a module. Raises ValueError where all the modules together take longer than `SECONDS`."""
        began = time.monotonic()
        try:
            hits = (value for pattern, value in self.found if pattern.match(module, timeout=max(self.left, 1e-3)))
            return next(hits, default)
        except TimeoutError:
            raise ValueError(f"{self.where}: its patterns take more than {SECONDS:g} s to match {module}") from None
        finally:
            self.left -= time.monotonic() - began
