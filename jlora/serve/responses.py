"""Answers that are no model's: the page, errors, and the stream that a model's answer is sent in."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from jlora.serve.request import Event
from jlora.serve.schema import BadRequest, error_json

PAGE = Path(__file__).with_name("page.html")
GONE = Event("", "cancelled", "the client has gone")


async def page(http: HTTPRequest) -> Response:
    """The chat page, which may run its own script and speak to this server alone."""
    html = PAGE.read_text(encoding="utf-8")
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    own = {tag: digest(re.search(f"<{tag}>(.*)</{tag}>", html, re.DOTALL)[1]) for tag in ("style", "script")}  # pyright: ignore[reportOptionalSubscript]
    policy = f"default-src 'none'; style-src 'sha256-{own['style']}'; script-src 'sha256-{own['script']}'"
    policy += "; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


class EventStream:
    """A response of server-sent events. `close` is called however it ends; seconds: the longest it may take."""

    def __init__(self, pieces: AsyncIterator[dict[str, Any]], close: Callable[[], None], seconds: float) -> None:
        self.pieces, self.close, self.seconds = pieces, close, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        body = lambda data, more: send({"type": "http.response.body", "body": data, "more_body": more})
        try:
            async with asyncio.timeout(self.seconds):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for piece in self.pieces:
                    await body(b"data: " + json.dumps(piece, ensure_ascii=False).encode() + b"\n\n", True)
                await body(b"data: [DONE]\n\n", True)
                await body(b"", False)
        finally:
            self.close()


async def gone(receive: Any, events: asyncio.Queue[Event]) -> None:
    """Put `GONE` among the events once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
    events.put_nowait(GONE)


def refused(http: HTTPRequest, error: Exception, close: bool = False) -> Response:
    assert isinstance(error, BadRequest)
    kind = "invalid_request_error" if error.status < 500 and error.status != 408 else "server_error"
    # what is left of a body that was not read must not be taken for the next request
    headers = {"Connection": "close"} if close or error.status in (408, 413, 415) else {}
    return JSONResponse(error_json(str(error), kind, error.param, error.code), error.status, headers)


def not_there(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{http.method} {http.url.path[:200]}: {error.detail}"
    return JSONResponse(error_json(said, "invalid_request_error"), error.status_code, error.headers)


def broken(http: HTTPRequest, error: Exception) -> Response:
    return JSONResponse(error_json("the server failed; its log says how", "server_error"), 500)
