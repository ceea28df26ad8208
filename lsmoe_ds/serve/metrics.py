"""Counters for Prometheus. The only values of labels are the models' directions and HTTP statuses."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lsmoe_ds.directions import Direction

NONE = "none"  # the direction of a request that was refused before its direction was known
SEVERAL = "several"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LINES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server."""

    def __init__(self, directions: Iterable[Direction]) -> None:
        self.registry = CollectorRegistry()
        self._known = {str(each) for each in directions} | {SEVERAL}

        both, one, to = ("status", "direction"), ("direction",), self.registry
        self._requests = Counter("lsmoe_requests", "Requests to translate or detect.", both, registry=to)
        self._seconds = Histogram(
            "lsmoe_request_seconds", "Time of an answered translation.", one, registry=to, buckets=SECONDS
        )
        self._batches = Histogram(
            "lsmoe_batch_lines", "Lines translated together.", registry=to, buckets=LINES
        )
        self._queue = Gauge("lsmoe_requests_in_progress", "Requests being answered.", registry=to)
        self._loaded = Gauge("lsmoe_models_loaded", "Engines in memory.", registry=to)
        self._bytes = Gauge("lsmoe_models_bytes", "Bytes of the engines in memory.", registry=to)
        self._loads = Counter("lsmoe_loads", "Engines loaded.", registry=to)
        self._cuts = Counter(
            "lsmoe_cuts", "Models extracted or converted: the cache lacked them.", registry=to
        )
        self._evictions = Counter("lsmoe_evictions", "Engines closed to make room.", registry=to)

    def answer(self, status: int, direction: str | None, seconds: float | None) -> None:
        """Count an answer, and its time if it is a translation."""
        name = direction if direction in self._known else NONE
        self._requests.labels(str(status), name).inc()
        if seconds is not None:
            self._seconds.labels(name).observe(seconds)

    def batch(self, lines: int) -> None:
        self._batches.observe(lines)

    def queue(self, requests: int) -> None:
        self._queue.set(requests)

    def load(self, cut: bool) -> None:
        self._loads.inc()
        if cut:
            self._cuts.inc()

    def evict(self) -> None:
        self._evictions.inc()

    def held(self, count: int, size: int) -> None:
        self._loaded.set(count)
        self._bytes.set(size)

    def render(self) -> bytes:
        """Return all counters as text."""
        return bytes(generate_latest(self.registry))
