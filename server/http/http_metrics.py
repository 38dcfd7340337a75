"""Prometheus metrics of HTTP, with closed label sets: templates of routes, known methods, statuses of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OTHER = "other"
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")  # in alphabetical order
_DURATION_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class HttpMetrics:
    """Counts requests from the outside: all of them, whether or not they reach a model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the metrics.

        Args:
            registry: of the server.
        """
        self.requests = Counter(
            "prime_http_requests",
            "HTTP requests by what they were answered; status 0: not at all, 499: the client went, or was cut off",
            ["route", "method", "status"],
            registry=registry,
        )
        self.duration_s = Histogram(
            "prime_http_request_duration_seconds",
            "Head of a request to the end of its answer",
            ["route"],
            buckets=_DURATION_S,
            registry=registry,
        )
        self._in_progress = Gauge(
            "prime_http_requests_in_progress", "HTTP requests without a whole answer", registry=registry
        )

    @contextmanager
    def in_progress(self) -> Iterator[None]:
        """Count the block as a request that is not answered yet."""
        with self._in_progress.track_inprogress():
            yield

    def done(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: template of a route, or "other".
            method: one of `METHODS`, or "other".
            status: of the answer; 0 for none.
            seconds: that it took.
        """
        self.requests.labels(route, method, str(status)).inc()
        self.duration_s.labels(route).observe(seconds)
