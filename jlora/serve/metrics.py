"""Prometheus metrics of a server. Labels have few values: routes, status codes, ends, and the first models named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from jlora.serve.engine import Engine

MOST_MODELS = 50
"""Model names that get a label of their own; all further ones share "other"."""
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """What the server counts, and the engine's own counts read at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.responses = Counter("jlora_responses", "HTTP responses.", ["route", "status"], registry=self.registry)
        self.requests = Counter("jlora_requests", "Requests begun, by model.", ["model"], registry=self.registry)
        self.first = Histogram(
            "jlora_first_token_seconds", "Arrival to first token.", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram("jlora_request_seconds", "Arrival to the end.", buckets=SECONDS, registry=self.registry)
        self.models: set[str] = set()
        self.registry.register(self)

    def model(self, name: str) -> str:
        """The label of a model's name; names that nobody serves never get here."""
        if name not in self.models and len(self.models) >= MOST_MODELS:
            return "other"
        self.models.add(name)
        return name

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        engine = self.engine
        for name, what, value in (
            ("running", "Requests in slots.", len(engine.batch.running)),
            ("waiting", "Requests in the queue.", len(engine.waiting)),
            ("slots", "Slots.", engine.batch.slots),
            ("adapters_offered", "Adapters by name.", len(engine.names())),
            ("adapters_resident", "Adapters in memory.", len(engine.shelf.bank)),
        ):
            yield GaugeMetricFamily(f"jlora_{name}", what, value)
        counts = dict(engine.counts)
        for name, what in (
            ("prompt_tokens", "Prompt tokens read."),
            ("generation_tokens", "Tokens written."),
            ("steps", "Decoding steps of all slots."),
            ("merges", "Times that a batch of one adapter had it merged."),
        ):
            yield CounterMetricFamily(f"jlora_{name}", what, counts.get(name, 0))
        ends = CounterMetricFamily("jlora_finished", "Requests ended, by reason.", labels=["reason"])
        for name, value in counts.items():
            if name.startswith("finished_"):
                ends.add_metric([name.removeprefix("finished_")], value)
        yield ends

    def text(self) -> bytes:
        return generate_latest(self.registry)
