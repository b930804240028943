"""Continuous batching: requests join and leave the running batch between two steps, each with its own adapter.

One thread runs the model. Others give it requests and commands through a lock, and get events back.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.bank import AdapterBank, BankFull, Shelf
from jlora.generate import writes
from jlora.io.load import Pretrained
from jlora.io.text import one_line
from jlora.serve.alone import Alone
from jlora.serve.request import Ask, Event, Request
from jlora.serve.sample import Sampling
from jlora.serve.slots import decode, empty, prefill, resized, seat


class QueueFull(RuntimeError):
    """As many requests wait as are allowed to."""


class Engine:
    """`base` with adapters, `slots` requests at a time of at most `max_length` tokens each, prompt and answer.

    queue: requests that may wait. adapters: how many stay in memory; others are read from disk when asked for.
    together: prompts of one padded length that are read at once. burst: tokens a slot between two looks at the queue;
    above 1 the device is asked less often, a new request waits longer, and what is written past an end is dropped.
    merge_after: steps of one adapter alone before it is merged (`serve/alone.py`); 0: never.
    """

    def __init__(
        self,
        base: Pretrained,
        *,
        slots: int = 8,
        max_length: int = 1024,
        queue: int = 64,
        adapters: int = 8,
        rank: int = 8,
        smallest: int = 32,
        together: int = 4,
        burst: int = 1,
        merge_after: int = 32,
    ) -> None:
        sizes = {"slots": slots, "queue": queue, "adapters": adapters, "together": together, "burst": burst}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: it must be 1 or more")
        if merge_after < 0:
            raise ValueError(f"merge_after = {merge_after}: steps, or 0 for never")
        if not writes(base.model):
            raise ValueError(f"{base.source} is an encoder: it writes no text")
        if base.tokenizer is None:
            raise ValueError(f"{base.source} has no tokenizer")
        if max_length < smallest:
            raise ValueError(f"max_length = {max_length}: at least {smallest}")
        base.check(max_length, 0)
        self.base, self.max_length, self.most_waiting = base, max_length, queue
        # at least one adapter more than slots: a request is never kept waiting by the adapters of the others
        self.shelf = Shelf(base, AdapterBank(base.params, capacity=max(adapters, slots + 1), rank=rank))
        self.alone = Alone(base.params, self.shelf.bank, merge_after)
        self.running: list[Request | None] = [None] * slots
        self.smallest, self.together, self.burst = smallest, min(together, slots), burst
        self.size = smallest
        self.state = empty(base.model, slots, self.size)
        self.rows, self.how = np.zeros(slots, np.int32), [Ask((0,))] * slots
        self.placed: Any = None  # active, rows and settings on the device, as long as nobody comes or goes
        self.waiting: collections.deque[Request] = collections.deque()
        self.admitting: Request | None = None  # in neither of the two, but not to be forgotten
        self.commands: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self.changed, self.stopping, self.failed = threading.Condition(), False, ""
        self.counts: dict[str, float] = collections.defaultdict(float)
        self.thread = threading.Thread(target=self.loop, name="jlora-engine", daemon=True)

    # ------------------------------------------------------------ from any thread

    def start(self) -> Engine:
        self.thread.start()
        return self

    def stop(self) -> None:
        """End the thread; requests that are not done end as cancelled."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def submit(self, ask: Ask, emit: Callable[[Event], None], timeout: float = float("inf")) -> Request:
        """Queue a request. Raises ValueError for one that cannot fit, QueueFull, RuntimeError if the engine is down."""
        if not ask.tokens:
            raise ValueError("the prompt has no tokens")
        if len(ask.tokens) + ask.max_tokens > self.max_length:
            raise ValueError(
                f"{len(ask.tokens)} prompt tokens and {ask.max_tokens} new ones are more than the {self.max_length} "
                "of a request's cache: shorten the prompt or lower max_tokens"
            )
        request = Request(ask, emit, time.monotonic() + timeout)
        with self.changed:
            if self.failed or self.stopping:
                raise RuntimeError(self.failed or "the engine has stopped")
            if len(self.waiting) >= self.most_waiting:
                raise QueueFull(f"{self.most_waiting} requests wait already: try again later")
            self.waiting.append(request)
            self.changed.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Its slot is free after the present step."""
        with self.changed:
            request.cancelled = True
            self.changed.notify()

    def ask_thread(self, command: Callable[[], Any]) -> Future[Any]:
        """Have the engine's thread do something between two steps."""
        future: Future[Any] = Future()
        with self.changed:
            if self.failed or self.stopping:
                raise RuntimeError(self.failed or "the engine has stopped")
            self.commands.append((command, future))
            self.changed.notify()
        return future

    def speaker(self, adapter: Any) -> Pretrained:
        """The base with the chat template of a `Shelf` entry, or, for None, with its own."""
        return self.base if adapter is None else adapter.base

    def load(self, name: str, folder: Path) -> Future[Any]:
        """Offer an adapter, or a new one under an old name: requests that run keep the old.

        The file is read here, in the caller's thread. Raises what `Shelf.examine` raises.
        """
        held = self.shelf.examine(name, folder)
        return self.ask_thread(lambda: self.shelf.offer(held))

    def unload(self, name: str) -> Future[Any]:
        return self.ask_thread(lambda: self.shelf.drop(name))

    def names(self) -> list[str]:
        return list(self.shelf.held)

    def wait_seconds(self) -> int:
        """When a request that found the queue full had better come back."""
        return 1 + len(self.waiting) // len(self.running)

    def bucket(self, length: int) -> int:
        """`length` or a little more: the next power of two, so that few shapes are compiled."""
        size = self.smallest
        while size < length:
            size *= 2
        return min(size, self.max_length)

    # ------------------------------------------------------------ the engine's thread

    def loop(self) -> None:
        try:
            while self.wait():
                self.turn()
            self.abandon("cancelled", "the server is stopping")
        except BaseException as error:  # whatever it is, a tokenizer's panic too, those who wait must hear of it
            self.failed = f"the engine failed: {type(error).__name__}: {error}"
            self.abandon("error", self.failed)
            raise

    def wait(self) -> bool:
        """Sleep until there is something to do; False to end."""
        with self.changed:
            while not (self.stopping or self.waiting or self.commands or any(self.running)):
                self.changed.wait()
            return not self.stopping

    def turn(self) -> None:
        """Commands, then those who left, at most one new prompt, and one token for everybody."""
        while self.commands:
            command, future = self.commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command())
            except Exception as error:
                future.set_exception(error)
        self.clear()
        self.admit()
        if any(self.running):
            self.advance()

    def clear(self) -> None:
        now = time.monotonic()
        with self.changed:  # others append to it
            everybody = [*self.waiting, *filter(None, self.running)]
        for request in everybody:
            if request.cancelled or now > request.deadline:
                request.end("cancelled" if request.cancelled else "timeout", message="out of time")
        with self.changed:
            over = [r for r in self.waiting if r.finish]
            self.waiting = collections.deque(r for r in self.waiting if not r.finish)
        for request in over:
            self.counts[f"finished_{request.finish}"] += 1
        for slot, request in enumerate(self.running):
            if request is not None and request.finish:
                self.free(slot)

    def admit(self) -> None:
        """Read prompts of one padded length, as many as there are slots for, at most `together`."""
        group: list[int] = []
        while None in self.running and len(group) < self.together:
            with self.changed:
                request = self.waiting[0] if self.waiting else None
                if not request or (group and self.prompt_bucket(request) != self.prompt_bucket(self.running[group[0]])):
                    break
                self.admitting = self.waiting.popleft()
            slot, ask = self.running.index(None), request.ask
            try:
                row = self.shelf.pin(ask.adapter)
            except BankFull:
                with self.changed:
                    self.waiting.appendleft(request)
                self.admitting = None
                break
            except (ValueError, OSError) as error:  # the folder has gone or changed since it was offered
                self.refuse(request, str(error))
            except Exception as error:  # too little memory for it is a RuntimeError
                why = f"{type(error).__name__}: {one_line(error)}"
                self.refuse(request, f"{ask.adapter.name!r} did not get into memory, load one of a lower rank: {why}")
            else:
                self.running[slot], self.rows[slot], self.how[slot] = request, row, ask
                group.append(slot)
            self.admitting = None
        if group:
            self.read(group)

    def refuse(self, request: Request, message: str) -> None:
        request.end("error", message=message)
        self.counts["finished_error"] += 1

    def prompt_bucket(self, request: Request | None) -> int:
        assert request is not None
        return self.bucket(len(request.ask.tokens))

    def read(self, group: list[int]) -> None:
        """The prompts of these slots, all of one bucket; the first token of each, or an error for all of them."""
        asks = [self.how[slot] for slot in group]
        # one prompt or a full group, so that few shapes are compiled; rows that fill it up have no slot
        width = 1 if len(group) == 1 else self.together
        spare = [Ask((0,))] * (width - len(group))
        tokens = np.zeros((width, self.prompt_bucket(self.running[group[0]])), np.int32)
        for n, ask in enumerate(asks):
            tokens[n, : len(ask.tokens)] = ask.tokens
            self.counts["prompt_tokens"] += len(ask.tokens)
        counts = np.asarray([len(ask.tokens) for ask in asks] + [0] * len(spare), np.int32)
        rows = np.asarray([*self.rows[group], *[0] * len(spare)], np.int32)
        model, weights = self.base.model, self.alone.weights(ask.adapter for ask in asks)
        try:  # most often memory is short; nothing is given away yet, so the others go on
            new, cache = jax.block_until_ready(prefill(model, *weights, tokens, counts, rows, sampling(asks + spare)))
            self.fit(max(tokens.shape[1], self.size))
        except Exception as error:
            for slot in group:
                request = self.running[slot]
                assert request is not None
                why = f"{type(error).__name__}: {one_line(error)}"
                request.end("error", message=f"the prompt of {len(request.ask.tokens)} tokens was not read: {why}")
                self.free(slot)
            return
        places = np.asarray(group + [len(self.running)] * len(spare), np.int32)
        self.state, self.placed = seat(model, self.state, new, cache, places), None
        for slot, token in zip(group, np.asarray(new), strict=False):
            self.take(slot, int(token))

    def advance(self) -> None:
        """`burst` tokens in every slot, fewer where a cache would overflow."""
        longest = max(self.length(request) for request in self.running if request is not None)
        steps = self.burst if longest + self.burst <= self.max_length else 1
        self.fit(longest + steps)
        if self.placed is None:
            active = np.asarray([request is not None for request in self.running])
            self.placed = jax.device_put((active, self.rows.copy(), sampling(self.how)))
        adapters = [request.ask.adapter for request in self.running if request is not None]
        self.counts["merges"] += self.alone.stepped(adapters)
        weights = self.alone.weights(adapters)
        new, self.state = decode(self.base.model, steps, *weights, self.state, *self.placed)
        self.counts["steps"] += steps
        for tokens in np.asarray(new):
            for slot, token in enumerate(tokens):
                if self.running[slot] is not None:  # what is written past an end is dropped
                    self.take(slot, int(token))

    def length(self, request: Request) -> int:
        """Tokens in its cache: all but the newest, which the next step reads."""
        return len(request.ask.tokens) + len(request.new) - 1

    def fit(self, need: int) -> None:
        """Make the caches long enough, and shorter where a quarter does."""
        held = [self.length(request) for request in self.running if request is not None and request.new]
        size = self.bucket(max(need, *held, 0))
        if size > self.size or 4 * size <= self.size:
            self.state, self.size = resized(self.base.model, self.state, size), size

    def take(self, slot: int, token: int) -> None:
        request = self.running[slot]
        assert request is not None
        self.counts["generation_tokens"] += 1
        full = len(request.ask.tokens) + len(request.new) + 1 >= self.max_length
        base = self.speaker(request.ask.adapter)
        if request.take(token, base.tokenizer, base.ends, full):
            self.free(slot)

    def free(self, slot: int) -> None:
        request = self.running[slot]
        assert request is not None
        self.shelf.unpin(request.ask.adapter)
        self.counts[f"finished_{request.finish}"] += 1
        self.running[slot], self.how[slot], self.rows[slot], self.placed = None, Ask((0,)), 0, None

    def abandon(self, finish: Any, message: str) -> None:
        with self.changed:
            self.stopping = True
        for request in [*filter(None, [self.admitting, *self.running]), *self.waiting]:
            if not request.finish:
                request.end(finish, message=message)
        for _, future in self.commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError(message))


def sampling(asks: list[Ask]) -> Sampling:
    """Their settings as arrays."""
    column = lambda name, dtype: jnp.asarray([getattr(ask, name) for ask in asks], dtype)
    return Sampling(
        column("temperature", jnp.float32),
        column("top_k", jnp.int32),
        column("top_p", jnp.float32),
        column("min_p", jnp.float32),
        jnp.asarray([ask.seed % 2**32 for ask in asks], jnp.uint32),
    )
