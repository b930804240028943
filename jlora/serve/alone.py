"""Plain weights for a batch of one adapter: after a stretch of such steps its difference is added to the weights.

A product of rank r beside each weight costs a few per cent of a step, a sum once the time of about one. The sum is
taken beside the base: only the adapted weights exist twice, un-merging is to use the base again, which is bit for bit
what it was, and a request of another adapter waits for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.bank import AdapterBank
from jlora.io.text import one_line

LOG = logging.getLogger(__name__)
MIXED = object()
"""In place of an adapter: there are several."""


class Alone:
    """Which weights a program runs on. `held`: the adapter whose plain weights are at hand; None, the base, at first.

    after: steps of one adapter alone before it is merged, one at a time; 0: never. Weights of less than float32 are not
    merged: the sum would be rounded, and the answers others.
    """

    def __init__(self, params: Any, bank: AdapterBank, after: int) -> None:
        self.params, self.bank, self.after = params, bank, after
        self.exact = all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        self.no_bank = jax.tree.map(lambda _: None, params)
        self.held: Hashable | None = None
        self.plain = params
        self.last: Any = None
        self.steps = 0

    def weights(self, adapters: Iterable[Hashable | None]) -> tuple[Any, Any]:
        """(params, bank's tree) for rows of these adapters: two forms, so at most two programs a shape."""
        if self.after and only(adapters) == self.held:
            return self.plain, self.no_bank
        return self.params, self.bank.tree()

    def stepped(self, adapters: Iterable[Hashable | None]) -> bool:
        """Count a step of these adapters in; True if one was merged for it. It must be in the bank.

        A sum that gets no memory is the last that is tried: the factors go on.
        """
        one = only(adapters)
        self.steps = self.steps + 1 if one == self.last else 1
        self.last = one
        due = self.after and self.steps >= self.after and one is not MIXED and one != self.held
        if not due or not (self.exact or one is None):
            return False
        self.plain, self.held = self.params, None  # the last one's sum makes room
        try:
            self.plain = jax.block_until_ready(self.bank.merged(self.params, one))
        except RuntimeError as error:
            LOG.warning("no adapter is merged from now on: %s: %s", type(error).__name__, one_line(error))
            self.after = 0
            return False
        self.held = one
        return True


def only(adapters: Iterable[Hashable | None]) -> Any:
    """The one adapter there is, or MIXED."""
    found = set(adapters)
    return found.pop() if len(found) == 1 else MIXED
