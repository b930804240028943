"""The load test itself for a few seconds; ten minutes of it are run by hand (docs/serving.md)."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import httpx
import uvicorn

from jlora.cli import main

PATH = Path(__file__).parents[2] / "experiments" / "serving" / "load.py"


def test_clients_that_do_everything_at_once_get_right_answers(place):
    spec = importlib.util.spec_from_file_location("load", PATH)
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    base, folder = place
    prompts = ["Review : good film", "bad", "film film fine awful :"]
    report = load.main(
        [
            "--model",
            base.source,
            "--adapters",
            str(folder),
            "--minutes",
            "0.1",
            "--clients",
            "6",
            "--prompts",
            *prompts,
        ]
    )
    assert report["wrong"] == [] and report["left in the server"] == {"running": 0, "waiting": 0}
    assert {"greedy answer", "greedy stream", "broken off", "loaded", "unloaded"} <= set(report["done"])
    assert report["exit"] in (-signal.SIGTERM, 128 + signal.SIGTERM, 0)


def test_an_idle_connection_outlives_what_its_client_keeps_of_it(place, monkeypatch):
    base, folder = place
    told = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **how: told.update(how))
    main(["serve", "--model", base.source, "--adapters", str(folder), "--slots", "1"])
    assert told["timeout_keep_alive"] > 2 * httpx.Limits().keepalive_expiry
