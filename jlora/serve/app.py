"""The HTTP server: OpenAI's completions and chat over an `Engine`, adapters loaded and unloaded as in vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jlora.io import Pretrained
from jlora.serve.engine import Engine, QueueFull
from jlora.serve.folders import Folders, name_of
from jlora.serve.guard import allowed, key_digest, read_body
from jlora.serve.metrics import Metrics
from jlora.serve.request import CONTEXT, Event, Request
from jlora.serve.responses import GONE, EventStream, broken, gone, not_there, page, refused
from jlora.serve.schema import (
    Answer,
    BadRequest,
    ask_of,
    check_fields,
    error_json,
    flag,
    prompt_tokens,
    read_object,
    text_of,
)

STATUS = {"timeout": 408, "cancelled": 503, "error": 500}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request: bytes of its body, seconds for the body to come, seconds for the answer; and adapters offered."""

    body: int = 1 << 20
    body_seconds: float = 30.0
    seconds: float = 300.0
    offered: int = 10_000


class Server:
    """`engine` served as the model `name`, its adapters under their names. key: what `Authorization: Bearer` needs."""

    def __init__(
        self, engine: Engine, name: str, folders: Folders, limits: Limits | None = None, key: str | None = None
    ) -> None:
        self.engine, self.name, self.folders, self.limits = engine, name, folders, limits or Limits()
        self.digest = None if key is None else key_digest(key)
        self.metrics = Metrics(engine)
        self.metrics.model(name)
        self.began = int(time.time())
        # a Hugging Face tokenizer is not safe in several threads, and a long prompt must not hold up the others' tokens
        self.reader = ThreadPoolExecutor(1, "jlora-tokenizer")
        self.reading = 0
        # a text of known words cannot fit if it is longer than this
        self.most_text = engine.max_length * max(map(len, engine.base.tokenizer.get_vocab()))
        self.loading = asyncio.Lock()

    def app(self) -> Any:
        """The ASGI application."""
        routes = [
            Route("/", page),
            Route("/health", self.health),
            Route("/metrics", self.scrape),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {BadRequest: refused, HTTPException: not_there, Exception: broken}
        handlers[QueueFull] = self.full
        known = {route.path for route in routes}
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self.lifespan)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await inner(scope, receive, send)
            status = 500

            async def counted(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            http = HTTPRequest(scope)
            headers, answer = http.headers, inner
            if "content-length" in headers and "transfer-encoding" in headers:
                # two lengths: what a proxy before this takes for one request may be two (RFC 9112, 6.1)
                both = BadRequest("content-length and transfer-encoding exclude each other")
                answer = refused(http, both, close=True)
            elif not allowed(headers, scope["path"], self.digest):
                said = error_json("the API key is missing or wrong", "authentication_error", code="invalid_api_key")
                answer = JSONResponse(said, 401, {"WWW-Authenticate": "Bearer"})
            try:
                await answer(scope, receive, counted)
            finally:  # what fails is raised again once 500 is answered
                route = scope["path"] if scope["path"] in known else "other"
                self.metrics.responses.labels(route, str(status)).inc()

        return app

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.stop)

    # ------------------------------------------------------------ answers

    async def completions(self, http: HTTPRequest) -> Any:
        return await self.answer(http, chat=False)

    async def chat(self, http: HTTPRequest) -> Any:
        return await self.answer(http, chat=True)

    async def body(self, http: HTTPRequest) -> dict[str, Any]:
        return read_object(await read_body(http, self.limits.body, self.limits.body_seconds))

    async def answer(self, http: HTTPRequest, chat: bool) -> Any:
        arrived = time.monotonic()
        body = await self.body(http)
        name, adapter = self.adapter(body)
        check_fields(body, chat)
        streaming, options = flag(body, "stream"), body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise BadRequest("stream_options must be an object", "stream_options")
        left = lambda: self.limits.seconds - (time.monotonic() - arrived)
        tokens = await self.tokens(body, self.engine.shelf.speaker(adapter), chat, left())
        ask = ask_of(body, tokens, adapter, chat, self.engine.max_length)
        if not chat:
            ask = dataclasses.replace(ask, before=ask.tokens[-CONTEXT:])
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            request = self.engine.submit(ask, emit, left())
        except QueueFull:
            raise
        except RuntimeError as error:
            raise BadRequest(str(error), status=503) from None
        self.metrics.requests.labels(self.metrics.model(name)).inc()
        watch = asyncio.create_task(gone(http.receive, events))

        def close() -> None:
            watch.cancel()
            if not request.finish:
                self.engine.cancel(request)
            self.metrics.whole.observe(time.monotonic() - arrived)

        out = Answer(name, chat, len(tokens))
        try:
            first = await events.get()  # before anything is sent: what fails now has a status
            self.check(first)
            self.metrics.first.observe(time.monotonic() - arrived)
            if streaming:
                usage = bool(options.get("include_usage"))
                return EventStream(self.pieces(out, request, events, first, usage), close, self.limits.seconds + 60)
            text = await self.rest(events, first)
        except BaseException:
            close()
            raise
        close()
        return JSONResponse(out.whole(text, request.finish or "stop", len(request.new)))

    async def tokens(self, body: dict[str, Any], base: Pretrained, chat: bool, seconds: float) -> list[int]:
        """The prompt's. Raises QueueFull while as many are read as have a place afterwards, BadRequest."""
        most = self.engine.most_waiting + self.engine.batch.slots
        if self.reading >= most:
            raise QueueFull(f"{most} prompts are being read already: try again later")
        loop, given = asyncio.get_running_loop(), (base.tokenizer, chat, base.config.vocab_size, self.most_text)
        self.reading += 1
        try:
            async with asyncio.timeout(seconds):
                return await loop.run_in_executor(self.reader, prompt_tokens, body, *given)
        except TimeoutError:
            raise BadRequest("out of time", status=408) from None
        finally:
            self.reading -= 1

    def full(self, http: HTTPRequest, error: Exception) -> Response:
        said = error_json(str(error), "rate_limit_error", code="queue_full")
        return JSONResponse(said, 429, {"Retry-After": str(self.engine.wait_seconds())})

    def check(self, event: Event) -> None:
        """Raises BadRequest for an end that is no answer."""
        if event.finish in STATUS:
            # nobody reads the first; it is for the metrics, by the number that proxies use
            raise BadRequest(event.message, status=499 if event is GONE else STATUS[event.finish])

    async def rest(self, events: asyncio.Queue[Event], event: Event) -> str:
        text = event.text
        while not event.finish:
            event = await events.get()
            self.check(event)
            text += event.text
        return text

    async def pieces(
        self, out: Answer, request: Request, events: asyncio.Queue[Event], event: Event, usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        if out.chat:
            yield out.piece("", first=True)
        while True:
            if event.finish in STATUS:
                yield error_json(event.message, "server_error", code=event.finish)
                return
            if event.text:
                yield out.piece(event.text)
            if event.finish:
                break
            event = await events.get()
        yield out.piece(None, event.finish)
        if usage:
            yield out.last(len(request.new))

    def adapter(self, body: dict[str, Any]) -> tuple[str, Any]:
        """(the model's name, its shelf entry or None for the base). Raises BadRequest."""
        name = text_of(body.get("model"), "model")
        held = self.engine.shelf.held.get(name)
        if held is None and name != self.name:
            raise BadRequest(f"the model {name[:200]!r} does not exist", "model", 404, "model_not_found")
        return name, held

    # ------------------------------------------------------------ models

    def card(self, name: str) -> dict[str, Any]:
        held = self.engine.shelf.held.get(name)
        root, parent = (str(held.folder), self.name) if held else (self.engine.base.source, None)
        card = {"id": name, "object": "model", "created": self.began, "owned_by": "jlora"}
        return {**card, "root": root, "parent": parent, "max_model_len": self.engine.max_length}

    async def models(self, http: HTTPRequest) -> Response:
        names = [self.name, *self.engine.names()]
        return JSONResponse({"object": "list", "data": [self.card(name) for name in names]})

    async def model(self, http: HTTPRequest) -> Response:
        return JSONResponse(self.card(self.adapter({"model": http.path_params["name"]})[0]))

    async def load(self, http: HTTPRequest) -> Response:
        body = await self.body(http)
        name = name_of(body.get("lora_name"))
        folder = await asyncio.to_thread(self.folders.find, text_of(body.get("lora_path"), "lora_path"))
        async with self.loading:
            known = self.engine.names()
            if name == self.name:
                raise BadRequest(f"{name!r} is the base model's name", "lora_name")
            if name in known and not flag(body, "load_inplace"):
                raise BadRequest(f"{name!r} is loaded already: load_inplace replaces it", "lora_name")
            if name not in known and len(known) >= self.limits.offered:
                raise BadRequest(f"{len(known)} adapters are offered already, the most that may be", "lora_name")
            try:
                await asyncio.wrap_future(await asyncio.to_thread(self.engine.load, name, folder))
            except (ValueError, OSError) as error:
                raise BadRequest(str(error), "lora_path") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, http: HTTPRequest) -> Response:
        name = name_of((await self.body(http)).get("lora_name"))
        try:
            await asyncio.wrap_future(self.engine.unload(name))
        except KeyError:
            raise BadRequest(f"no adapter {name!r} is loaded", "lora_name", 404, "model_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    # ------------------------------------------------------------ the rest

    async def health(self, http: HTTPRequest) -> Response:
        wrong = self.engine.failed or ("the server is stopping" if self.engine.stopping else "")
        return JSONResponse({"status": wrong or "ok"}, 503 if wrong else 200)

    async def scrape(self, http: HTTPRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")
