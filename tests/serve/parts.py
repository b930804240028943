"""A small base on disk with three adapters, an engine over it, and asking it."""

from __future__ import annotations

import queue
import socket
import threading

import httpx
import jax
import numpy as np
import uvicorn

import jlora
from jlora.generate import GenerateConfig, generate, pad_left
from jlora.io.adapters import load_adapter
from jlora.io.load import load
from jlora.io.peft import save_peft
from jlora.serve.app import Limits, Server
from jlora.serve.engine import Engine
from jlora.serve.folders import Folders
from jlora.serve.http import Protocol
from jlora.serve.request import Ask
from tests.small import small_model
from tests.wait import until

NAMES = ("film", "news", "tweets")
PROMPTS = [(5, 6, 7), (3, 9, 11, 4, 8, 8, 3), (12,), (7, 7, 7, 7), (13, 5)]


def adapter(params, layouts, seed, rank=4):
    """Random factors, by numpy: nothing is compiled."""
    shapes = jax.eval_shape(lambda: jlora.lorafy(params, rank, alpha=8.0, layouts=layouts)[1])
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda like: draw.normal(0, 0.4, like.shape).astype(np.float32), shapes)


def made(folder):
    """(base, folder of adapters)."""
    base = load(small_model(folder / "base"))
    for n, name in enumerate(NAMES):
        save_peft(
            folder / "adapters" / name,
            adapter(base.params, base.layouts, n, 2 + n),
            jlora.LoraConfig(r=2 + n, lora_alpha=8),
            base.tensors,
            "small",
        )
    return base, folder / "adapters"


def offline(base, folder, prompt, count, ignore_eos=False):
    """What `generate` writes after a prompt, by itself: the first `count` tokens of 50, so that one program does."""
    params = base.params
    assert count <= 50
    if folder is not None:
        frozen, lora, _ = load_adapter(base, folder)
        params = jlora.combine(frozen, lora)
    config = GenerateConfig(max_new_tokens=50, end=() if ignore_eos else (base.tokenizer.eos_token_id,))
    return generate(base.model, params, *pad_left([prompt]), config)[0][:count]


class Asked:
    """A request submitted to an engine."""

    def __init__(self, engine, prompt, adapter=None, timeout=600.0, **settings):
        self.events = queue.SimpleQueue()
        held = engine.shelf.held[adapter] if adapter else None
        self.request = engine.submit(Ask(tuple(prompt), held, **settings), self.events.put, timeout)

    def wait(self):
        """(text, finish) once it is over."""
        text = ""
        while True:
            event = self.events.get(timeout=600)
            text += event.text
            if event.finish:
                return text, event.finish


class Served:
    """A server on a free port of the loopback."""

    def __init__(self, base, folder, key=None, limits=None, **engine):
        self.base, self.folder = base, folder
        self.engine = Engine(
            base, **{"slots": 3, "max_length": 64, "queue": 20, "adapters": 4, "smallest": 16} | engine
        )
        for name in NAMES:
            self.engine.shelf.put(name, folder / name)
        self.engine.start()
        app = Server(self.engine, "small", Folders([folder]), limits or Limits(), key).app()
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none", http=Protocol))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path, headers=None, **body):
        return self.http.post(path, json=body, headers=headers)

    def raw(self, headers, body):
        """A socket on which a completion has been asked for."""
        raw = socket.create_connection(self.url.removeprefix("http://").split(":"))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n\r\n"
        raw.sendall((head + body).encode())
        return raw

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.engine.thread.is_alive()
