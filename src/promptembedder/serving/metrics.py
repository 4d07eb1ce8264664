"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one server; the names that Prometheus sees begin with `promptembedder_`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"namespace": "promptembedder", "registry": self._registry}
        self.answers = Counter("answers", "Answers on /v1, by status.", ["status"], **kept)
        self.seconds = Histogram(
            "request_seconds", "From request to answer, of answers with 200.", buckets=_SECONDS, **kept
        )
        self.texts = Counter("texts", "Texts embedded.", **kept)
        self.tokens = Counter("tokens", "Tokens computed, soft tokens among them.", **kept)
        self.batch_texts = Histogram("batch_texts", "Texts of a forward.", buckets=_TEXTS, **kept)
        self.busy = Counter("device_seconds", "Seconds spent in forwards.", **kept)
        self.dropped = Counter("dropped_requests", "Requests whose clients were gone.", **kept)
        self.new_instructions = Counter("new_instructions", "Instructions that requests had to wait for.", **kept)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is looked up when somebody asks."""
        Gauge(name, text, namespace="promptembedder", registry=self._registry).set_function(value)

    def ran(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a forward."""
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batch_texts.observe(texts)
        self.busy.inc(seconds)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
