"""What a request must pass before it is read: the API key, the body's size, its kind and how long it takes to come."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Any

from starlette.requests import ClientDisconnect

from jlora.serve.schema import BadRequest

OPEN = ("/", "/health")
"""Paths that need no key: the page asks for it, a load balancer has none."""


def allowed(headers: Any, path: str, digest: bytes | None) -> bool:
    """Whether `Authorization: Bearer KEY` is right, in a time that does not depend on it. digest: of the key, or None.

    Digests are compared, so not even the key's length can be measured.
    """
    if digest is None or path in OPEN:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(key_digest(given.strip()), digest)
    return right and scheme.lower() == "bearer"


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


async def read_body(request: Any, most: int, seconds: float) -> bytes:
    """The body, of at most `most` bytes. Raises BadRequest: 413 too large, 408 too slow, 415 no JSON.

    Only application/json is read: a page of another site cannot send that without asking first (CORS).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"content-type must be application/json, got {kind[:60] or 'none'}", status=415)
    large = BadRequest(f"the body is larger than {most} bytes", status=413)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise large
    except ClientDisconnect:
        raise BadRequest("the client has gone", status=499) from None
    except TimeoutError:
        raise BadRequest(f"the body did not come within {seconds:g} s", status=408) from None
    return bytes(body)
