"""Where JAX releases differ in how a traced equation is written down (JAX 0.10 to 0.12)."""

from __future__ import annotations

from typing import Any


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """(number of constants, number of carried values) among a scan's operands."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12 keeps the three trees in place of two counts
    return len(consts), len(carry)


def manual_axes(params: dict[str, Any]) -> set[str]:
    """The mesh axes that a shard_map makes manual."""
    return set(params["manual_axes"] if "manual_axes" in params else params["newly_manual_axes"])
