"""What files and other libraries say, made fit for a message: one short line with nothing that a terminal obeys."""

from __future__ import annotations


def one_line(value: object, most: int = 240) -> str:
    """`str(value)` with runs of white space as one space and unprintable characters by their codes."""
    text = " ".join(str(value)[: 8 * most].split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[:most]}..."
