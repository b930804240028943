"""uvicorn's HTTP/1.1 with an end to waiting for headers: who sends them slowly, or none, is cut off."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Protocol(H11Protocol):
    """`uvicorn.run(http=Protocol)`. A connection is closed `headers_within` seconds after it was made, or after the
    first byte that followed an answer, if no request has begun by then. A body has its own limit (`guard.read_body`).
    """

    headers_within = 30.0
    headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is here."""
        super().connection_made(transport)
        self.headers_due = self.loop.call_later(self.headers_within, transport.close)

    def data_received(self, data: bytes) -> None:
        """Bytes of headers or of a body."""
        before = self.cycle
        if self.headers_due is None and (before is None or before.response_complete):
            self.headers_due = self.loop.call_later(self.headers_within, self.transport.close)
        super().data_received(data)
        if self.cycle is not before:
            self.begun()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self.begun()
        super().connection_lost(exc)

    def begun(self) -> None:
        """Nothing is waited for any more."""
        if self.headers_due is not None:
            self.headers_due.cancel()
            self.headers_due = None
