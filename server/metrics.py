"""Prometheus metrics of one server, in a registry of their own.

Label sets are closed: nothing a client sends becomes a label, so the number of series never grows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prime_core.models.denoiser import filled_size

Rejection = Literal["invalid", "queue_full", "draining", "unavailable"]
Failure = Literal["engine_error", "non_finite", "cancelled", "unavailable"]

_LATENCY_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_STEP_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_POWERS = tuple(2**k for k in range(13))
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.125, 0.25, 0.5, 1.0)


class Metrics:
    """All metrics of a server; prometheus_client makes every update safe between threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._build_request_metrics()
        self._build_engine_metrics()
        for finish in ("stop", "length"):
            self.success.labels(finish)
        for rejection in get_args(Rejection):
            self.rejected.labels(rejection)
        for failure in get_args(Failure):
            self.failed.labels(failure)

    def _build_request_metrics(self) -> None:
        gauge = partial(Gauge, registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.running = gauge("prime_num_requests_running", "Requests with a row that has run")
        self.waiting = gauge("prime_num_requests_waiting", "Requests that wait for a call")
        self.success = counter(
            "prime_request_success", "Requests answered, by why their outputs end", ["finished_reason"]
        )
        self.rejected = counter("prime_rejected", "Requests refused before any work", ["reason"])
        self.failed = counter("prime_request_failure", "Accepted requests that failed", ["reason"])
        self.latency_s = histogram(
            "prime_e2e_request_latency_seconds", "Arrival to answer", buckets=_LATENCY_S
        )
        self.queue_s = histogram(
            "prime_request_queue_time_seconds", "Arrival to first denoiser call", buckets=_LATENCY_S
        )
        self.nfe = histogram("prime_request_nfe", "Denoiser calls of a row", buckets=_POWERS)
        self.prompt_tokens = counter("prime_prompt_tokens", "Fixed tokens of requests")
        self.tokens = counter("prime_generation_tokens", "Generated tokens")

    def _build_engine_metrics(self) -> None:
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.calls = counter("prime_denoiser_calls", "Calls of the denoiser")
        self.row_steps = counter("prime_row_steps", "Rows times calls")
        self.row_steps_skipped = counter("prime_row_steps_skipped", "Steps of rows that cost no call")
        self.step_s = histogram(
            "prime_step_duration_seconds", "One denoiser call with its draws", buckets=_STEP_S
        )
        self.batch_rows = histogram("prime_batch_rows", "Rows of a denoiser call", buckets=_POWERS)
        self.padding_ratio = histogram(
            "prime_batch_padding_ratio", "Share of a call's tokens that only fill it up", buckets=_SHARES
        )
        self.model_info = Gauge(
            "prime_model_info", "The loaded model", ["model", "dtype", "device"], registry=self.registry
        )

    def watch(self, num_running: Callable[[], float], num_waiting: Callable[[], float]) -> None:
        """Read the two gauges of requests from the engine whenever they are asked for."""
        self.running.set_function(num_running)
        self.waiting.set_function(num_waiting)

    def call_done(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """Count one denoiser call over rows that hold ``num_tokens`` tokens together."""
        self.calls.inc()
        self.row_steps.inc(num_rows)
        self.batch_rows.observe(num_rows)
        self.padding_ratio.observe(1 - num_tokens / filled_size(num_tokens))
        self.step_s.observe(seconds)

    def reject(self, reason: Rejection) -> None:
        """Count a request that was refused before any work."""
        self.rejected.labels(reason).inc()

    def fail(self, reason: Failure) -> None:
        """Count an accepted request that got no answer."""
        self.failed.labels(reason).inc()

    def render(self) -> bytes:
        """Return the Prometheus text format."""
        return generate_latest(self.registry)
