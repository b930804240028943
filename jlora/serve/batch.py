"""The running batch: a request in each slot, and what they have on the device. One thread alone touches it."""

from __future__ import annotations

import collections
from typing import Any

import jax
import numpy as np

from jlora.bank import Shelf
from jlora.io.load import Pretrained
from jlora.io.text import one_line
from jlora.serve.alone import Alone
from jlora.serve.request import Ask, Request
from jlora.serve.sample import sampling
from jlora.serve.slots import decode, empty, prefill, resized, seat

IDLE = Ask((0,))
"""The settings of a slot without a request."""


class Batch:
    """`slots` requests at a time, by slot in `running`; the other fields are those of `Engine`."""

    def __init__(
        self,
        base: Pretrained,
        shelf: Shelf,
        *,
        slots: int,
        max_length: int,
        smallest: int,
        together: int,
        burst: int,
        merge_after: int,
    ) -> None:
        self.base, self.shelf, self.slots, self.max_length = base, shelf, slots, max_length
        self.smallest, self.together, self.burst = smallest, min(together, slots), burst
        self.alone = Alone(base.params, shelf.bank, merge_after)
        self.running: dict[int, Request] = {}
        self.rows = np.zeros(slots, np.int32)  # of the adapters in the bank
        self.size = smallest
        self.state = empty(base.model, slots, smallest)
        self.placed: Any = None  # active, rows and settings on the device, as long as nobody comes or goes
        self.counts: dict[str, float] = collections.defaultdict(float)

    def join(self, request: Request) -> int:
        """The slot that the request gets, to be read. Raises what `Shelf.pin` raises; it has none then."""
        row = self.shelf.pin(request.ask.adapter)
        slot = next(n for n in range(self.slots) if n not in self.running)
        self.running[slot], self.rows[slot] = request, row
        return slot

    def leave(self, slot: int) -> None:
        """The slot is free; its request has ended."""
        request = self.running.pop(slot)
        self.shelf.unpin(request.ask.adapter)
        self.counts[f"finished_{request.finish}"] += 1
        self.rows[slot], self.placed = 0, None

    def read(self, slots: list[int]) -> None:
        """The prompts of these slots, all of one `padded` length; the first token of each, or an error for each."""
        requests = [self.running[slot] for slot in slots]
        asks = [request.ask for request in requests]
        # one prompt or a full group, so that few shapes are compiled; rows that fill it up have no slot
        spare = 0 if len(slots) == 1 else self.together - len(slots)
        tokens = np.zeros((len(slots) + spare, self.padded(asks[0])), np.int32)
        for n, ask in enumerate(asks):
            tokens[n, : len(ask.tokens)] = ask.tokens
            self.counts["prompt_tokens"] += len(ask.tokens)
        counts = np.asarray([len(ask.tokens) for ask in asks] + [0] * spare, np.int32)
        rows, how = np.asarray([*self.rows[slots], *[0] * spare], np.int32), sampling(asks + [IDLE] * spare)
        model, weights = self.base.model, self.alone.weights(ask.adapter for ask in asks)
        try:  # most often memory is short; nothing is given away yet, so the others go on
            new, cache = jax.block_until_ready(prefill(model, *weights, tokens, counts, rows, how))
            self.fit(max(tokens.shape[1], self.size))
        except Exception as error:
            why = f"{type(error).__name__}: {one_line(error)}"
            for slot, request in zip(slots, requests, strict=True):
                request.end("error", message=f"the prompt of {len(request.ask.tokens)} tokens was not read: {why}")
                self.leave(slot)
            return
        places = np.asarray(slots + [self.slots] * spare, np.int32)
        self.state, self.placed = seat(model, self.state, new, cache, places), None
        for slot, token in zip(slots, np.asarray(new), strict=False):
            self.take(slot, int(token))

    def advance(self) -> None:
        """`burst` tokens in every slot, one where a cache would overflow."""
        longest = max(map(held, self.running.values()))
        steps = self.burst if longest + self.burst <= self.max_length else 1
        self.fit(longest + steps)
        asks = {slot: request.ask for slot, request in self.running.items()}
        if self.placed is None:
            active = np.asarray([slot in asks for slot in range(self.slots)])
            how = sampling([asks.get(slot, IDLE) for slot in range(self.slots)])
            self.placed = jax.device_put((active, self.rows.copy(), how))
        adapters = [ask.adapter for ask in asks.values()]
        self.counts["merges"] += self.alone.stepped(adapters)
        weights = self.alone.weights(adapters)
        new, self.state = decode(self.base.model, steps, *weights, self.state, *self.placed)
        self.counts["steps"] += steps
        for tokens in np.asarray(new):
            for slot in [*self.running]:  # what is written past an end is dropped
                self.take(slot, int(tokens[slot]))

    def take(self, slot: int, token: int) -> None:
        """A request's new token, which may be its last."""
        request = self.running[slot]
        self.counts["generation_tokens"] += 1
        full = len(request.ask.tokens) + len(request.new) + 1 >= self.max_length
        base = self.shelf.speaker(request.ask.adapter)
        if request.take(token, base.tokenizer, base.ends, full):
            self.leave(slot)

    def fit(self, need: int) -> None:
        """Make the caches long enough, and shorter where a quarter does."""
        size = self.bucket(max(need, *(held(request) for request in self.running.values() if request.new), 0))
        if size > self.size or 4 * size <= self.size:
            self.state, self.size = resized(self.base.model, self.state, size), size

    def padded(self, ask: Ask) -> int:
        """The length of its prompt as it is read."""
        return self.bucket(len(ask.tokens))

    def bucket(self, length: int) -> int:
        """`length` or a little more: the next power of two, so that few shapes are compiled."""
        size = self.smallest
        while size < length:
            size *= 2
        return min(size, self.max_length)


def held(request: Request) -> int:
    """Tokens in its cache: all but the newest, which the next step reads."""
    return len(request.ask.tokens) + len(request.new) - 1
