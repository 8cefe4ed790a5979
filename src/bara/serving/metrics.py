"""What a server counts, in the form of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

REQUESTS_IN_PASS = (1, 2, 4, 8, 16, 32, 64, 128)
NATS = (0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """The numbers of one server: requests, its queue, passes, and how uncertain its answers are."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "bara_requests", "Requests answered.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "bara_request_seconds", "From a request to its answer.", ("route",), registry=registry
        )
        self.queue = Gauge("bara_queue_requests", "Requests that wait.", registry=registry)
        self.passes = Histogram(
            "bara_pass_requests",
            "Requests computed together.",
            buckets=REQUESTS_IN_PASS,
            registry=registry,
        )
        self.pass_seconds = Histogram("bara_pass_seconds", "Of a pass.", registry=registry)
        self.rows = Counter("bara_rows", "Texts or prompts, times draws.", registry=registry)
        self.tokens = Counter("bara_tokens", "New tokens.", ("model",), registry=registry)
        self.epistemic = Histogram(
            "bara_epistemic",
            "Epistemic part of the uncertainty of an answer: nats, or a variance for regression.",
            ("model",),
            buckets=NATS,
            registry=registry,
        )
        self.abstained = Counter(
            "bara_abstained", "Answers taken back as too uncertain.", ("model",), registry=registry
        )

    def told_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def told_pass(self, requests: int, rows: int, seconds: float) -> None:
        self.passes.observe(requests)
        self.pass_seconds.observe(seconds)
        self.rows.inc(rows)

    def told_answer(self, model: str, epistemic: float, abstained: bool = False) -> None:
        self.epistemic.labels(model).observe(epistemic)
        if abstained:
            self.abstained.labels(model).inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
