"""A Hub that breaks off in the middle of a file: one sentence, no half file in its place, and a rerun that succeeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(range(256)) * 4000}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from jlora.io.load import snapshot
try:
    print(snapshot("owner/name", None))
except OSError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """Two files of one model. While `broken`, a body ends halfway and the connection with it."""

    protocol_version, broken = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        name = self.path.partition("?")[0].rsplit("/", 1)[-1]
        told = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": file} for file in FILES]}
        if "/tree/" in self.path:
            told = [{"type": "file", "path": f, "size": len(x), "oid": "0" * 40} for f, x in FILES.items()]
        data, code, start = FILES.get(name, json.dumps(told).encode()), 200, 0
        if body and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            code = 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(data) - start))
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if name in FILES:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{name}"')
        self.end_headers()
        if not body:
            return
        half = Hub.broken and name == "model.safetensors"
        self.wfile.write(data[start : start + (len(data) - start) // 2] if half else data[start:])
        self.close_connection = half


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_that_breaks_off(hub, tmp_path):
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "secret"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    fetch = lambda: subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FETCH], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    done = fetch()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("FileNotFoundError owner/name is not in the cache and the Hub broke off"), done.stdout
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr
    assert "secret" not in done.stdout + done.stderr
    snapshots = tmp_path / "hub" / "models--owner--name" / "snapshots"
    assert not list(snapshots.rglob("model.safetensors"))
    Hub.broken = False
    done = fetch()
    folder = snapshots / COMMIT
    assert done.stdout.strip() == str(folder), done.stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert not list(tmp_path.rglob("*.incomplete"))
