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

from jlora.bank import AdapterBank, BankFull, Shelf
from jlora.generate import writes
from jlora.io.load import Pretrained
from jlora.io.text import one_line
from jlora.serve.batch import Batch
from jlora.serve.request import Ask, Event, Request


class QueueFull(RuntimeError):
    """As many requests wait as are allowed to."""


class Engine:
    """`base` with adapters, `slots` requests at a time of at most `max_length` tokens each, prompt and answer.

    queue: requests that may wait. adapters: how many stay in memory; others are read from disk when asked for. rank: of
    the adapters expected; a larger one makes room for itself. smallest: tokens of the shortest cache, and prompt, that
    is compiled for.
    together: prompts of one padded length that are read at once. burst: tokens a slot between two looks at the queue;
    above 1 the device is asked less often, a new request waits longer, and what is written past an end is dropped.
    merge_after: steps of one adapter alone before it is merged (`serve/alone.py`); 0: never. Raises ValueError for a
    number out of its range, more tokens than the model has positions, an encoder, or a base without a tokenizer.
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
        self.batch = Batch(
            base,
            self.shelf,
            slots=slots,
            max_length=max_length,
            smallest=smallest,
            together=together,
            burst=burst,
            merge_after=merge_after,
        )
        self.counts = self.batch.counts
        self.waiting: collections.deque[Request] = collections.deque()
        self.admitting: Request | None = None  # in neither of the two, but not to be forgotten
        self.commands: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self.changed, self.stopping, self.failed = threading.Condition(), False, ""
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
        return 1 + len(self.waiting) // self.batch.slots

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
            while not (self.stopping or self.waiting or self.commands or self.batch.running):
                self.changed.wait()
            return not self.stopping

    def turn(self) -> None:
        """Commands, then those who left, new prompts of one length, and a burst of tokens for everybody."""
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
        if self.batch.running:
            self.batch.advance()

    def clear(self) -> None:
        now = time.monotonic()
        with self.changed:  # others append to it
            everybody = [*self.waiting, *self.batch.running.values()]
        for request in everybody:
            if request.cancelled or now > request.deadline:
                request.end("cancelled" if request.cancelled else "timeout", message="out of time")
        with self.changed:
            over = [r for r in self.waiting if r.finish]
            self.waiting = collections.deque(r for r in self.waiting if not r.finish)
        for request in over:
            self.counts[f"finished_{request.finish}"] += 1
        for slot, request in [*self.batch.running.items()]:
            if request.finish:
                self.batch.leave(slot)

    def admit(self) -> None:
        """Read prompts of one padded length, as many as there are slots for, at most `together`."""
        group: list[int] = []
        length = 0
        while len(self.batch.running) < self.batch.slots and len(group) < self.batch.together:
            with self.changed:
                request = self.waiting[0] if self.waiting else None
                if not request or (group and self.batch.padded(request.ask) != length):
                    break
                self.admitting = self.waiting.popleft()
            length = self.batch.padded(request.ask)
            try:
                group.append(self.batch.join(request))
            except BankFull:
                with self.changed:
                    self.waiting.appendleft(request)
                self.admitting = None
                break
            except (ValueError, OSError) as error:  # the folder has gone or changed since it was offered
                self.refuse(request, str(error))
            except Exception as error:  # too little memory for it is a RuntimeError
                why = f"{type(error).__name__}: {one_line(error)}"
                name = request.ask.adapter.name
                self.refuse(request, f"{name!r} did not get into memory, load one of a lower rank: {why}")
            self.admitting = None
        if group:
            self.batch.read(group)

    def refuse(self, request: Request, message: str) -> None:
        request.end("error", message=message)
        self.counts["finished_error"] += 1

    def abandon(self, finish: Any, message: str) -> None:
        with self.changed:
            self.stopping = True
        for request in [self.admitting, *self.batch.running.values(), *self.waiting]:
            if request and not request.finish:
                request.end(finish, message=message)
        for _, future in self.commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError(message))
