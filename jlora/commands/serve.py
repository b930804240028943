"""`jlora serve`: a base model and its adapters behind OpenAI's HTTP interface, with a page to try them."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from jlora.commands.settings import say
from jlora.data.template import template_for
from jlora.io import load

KEEP_ALIVE = 30
"""Seconds an idle connection stays open: more than clients keep theirs (httpx, and so the openai client, 5), or now and
then one would be closed just as its client asks again."""


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serve a model and its adapters: OpenAI's HTTP interface, a chat page, Prometheus metrics."""

    model: str
    """Short name, Hub id, folder in Hub format, or .gguf file."""
    adapters: tuple[str, ...] = ()
    """Folders of adapters in PEFT's format (NAME/ or NAME/adapter/); served by NAME, and nothing else may be loaded."""
    host: str = "127.0.0.1"
    port: int = 8000
    chat_template: str | None = None
    """File of Jinja in place of the model's chat template; adapters that have one beside them keep theirs."""
    name: str | None = None
    """The base model's name for clients; its source's last part if not given."""
    slots: int = 8
    """Requests that are written at a time."""
    max_length: int = 1024
    """Tokens of a request, prompt and answer together."""
    queue: int = 64
    """Requests that may wait; more are refused with 429."""
    resident: int = 32
    """Adapters kept in memory; others are read from disk when asked for."""
    rank: int = 8
    """Of the adapters expected; a larger one makes room for itself."""
    merge_after: int = 32
    """Steps of one adapter alone before it is merged, which holds the adapted weights twice; 0: never."""
    seconds: float = 300.0
    """Longest time for one answer."""
    body_bytes: int = 1 << 20
    """Largest request body."""
    drain: int = 60
    """Seconds that answers under way get on SIGTERM."""
    api_key_file: str | None = None
    """File whose text clients must send as Authorization: Bearer; else JLORA_API_KEY, if set."""
    dtype: Literal["float32", "bfloat16"] = "float32"


def serve_command(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError for bad settings, and what `load` raises."""
    try:
        import uvicorn

        from jlora.serve.app import Limits, Server
        from jlora.serve.http import Protocol
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: pip install "jlora[serve]"') from None
    from jlora.serve.engine import Engine
    from jlora.serve.folders import Folders

    began = time.monotonic()
    folders, key, template = Folders(config.adapters), api_key(config), template_for(config.chat_template, None)
    say(f"reading {config.model}")
    # on a CPU a scan copies every layer's weights out of the stack, and a step of decoding is little more than that
    base = load(config.model, dtype=jnp.dtype(config.dtype), scan_layers=jax.default_backend() != "cpu")
    engine = Engine(
        base.speaking(template),
        slots=config.slots,
        max_length=config.max_length,
        queue=config.queue,
        adapters=config.resident,
        rank=config.rank,
        merge_after=config.merge_after,
    )
    name = config.name or Path(config.model).name.removesuffix(".gguf")
    for adapter, folder in folders.found().items():
        if adapter == name:
            raise ValueError(f"{folder}: an adapter has the base model's name {name!r}: give another with --name")
        try:
            engine.shelf.put(adapter, folder)
        except (ValueError, OSError) as error:
            say(f"not served: {adapter}: {error}")
    engine.start()
    say(f"{name} with {len(engine.names())} adapters ({', '.join(engine.names()[:20]) or 'none'})")
    say(f"ready after {time.monotonic() - began:.1f} s")
    if key is None and not loopback(config.host):
        say(f"warning: anybody who reaches {config.host} may use this server: set JLORA_API_KEY or --api-key-file")
    limits = Limits(body=config.body_bytes, seconds=config.seconds)
    app = Server(engine, name, folders, limits, key).app()
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        http=Protocol,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=config.drain,
    )


def api_key(config: ServeConfig) -> str | None:
    """The key clients need: from a file or the environment, never from a flag, which every user of the machine sees."""
    if config.api_key_file is None:
        return os.environ.get("JLORA_API_KEY") or None
    key = Path(config.api_key_file).read_text(encoding="utf-8").strip()
    if not key:
        raise ValueError(f"{config.api_key_file} is empty: it should hold the API key")
    return key


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
