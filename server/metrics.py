"""Prometheus metrics of one server, in a registry of their own.

Label sets are closed: nothing a client sends becomes a label, so the number of series never grows. The label
`model` is the name of a loaded model; it is empty where a request was refused before its model was known.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from server.http.http_metrics import HttpMetrics

Rejection = Literal["invalid", "busy", "queue_full", "deadline", "draining", "unavailable", "model_failed"]
Failure = Literal[
    "engine_error",
    "non_finite",
    "out_of_memory",
    "deadline",
    "cancelled",
    "unavailable",
    "model_failed",
    "internal_error",
]
Finish = Literal["stop", "length", "complete", "scored"]
FINISHES: dict[str, tuple[Finish, ...]] = {
    "text": ("stop", "length", "scored"),
    "images": ("complete", "scored"),
}

_LATENCY_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_STEP_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_POWERS = tuple(2**k for k in range(13))
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.125, 0.25, 0.5, 1.0)


_MOST_NOTED = 64


class _Call(NamedTuple):
    """See `Metrics.call_done`."""

    model: str
    num_rows: int
    num_tokens: int
    num_filling: int
    seconds: float


class _Settled(Collector):
    """Has no metrics of its own: counts what is noted whenever the registry is read."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle

    def collect(self) -> Iterable[Metric]:
        """Return nothing."""
        self._settle()
        return []


class Metrics:
    """All metrics of a server; prometheus_client makes every update safe between threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls: deque[_Call] = deque()
        self._settling = threading.Lock()
        self.registry.register(_Settled(self.settle))  # before all others: it is asked first
        self.http = HttpMetrics(self.registry)
        self._build_request_metrics()
        self._build_engine_metrics()
        self._create_rejections("")
        self._series_of_calls: dict[str, Sequence[Any]] = {}

    def _build_request_metrics(self) -> None:
        gauge = partial(Gauge, registry=self.registry, labelnames=["model"])
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, labelnames=["model"])
        self.running = gauge("prime_num_requests_running", "Requests with a row that has run")
        self.waiting = gauge("prime_num_requests_waiting", "Requests that wait for a call")
        self.success = counter(
            "prime_request_success",
            "Requests answered, by why their outputs end",
            ["model", "finished_reason"],
        )
        self.rejected = counter("prime_rejected", "Requests refused before any work", ["model", "reason"])
        self.failed = counter("prime_request_failure", "Accepted requests that failed", ["model", "reason"])
        self.latency_s = histogram(
            "prime_e2e_request_latency_seconds", "Arrival to answer", buckets=_LATENCY_S
        )
        self.queue_s = histogram(
            "prime_request_queue_time_seconds", "Arrival to first denoiser call", buckets=_LATENCY_S
        )
        self.nfe = histogram("prime_request_nfe", "Denoiser calls of a row", buckets=_POWERS)
        self.prompt_tokens = counter("prime_prompt_tokens", "Fixed tokens of text requests", ["model"])
        self.tokens = counter("prime_generation_tokens", "Generated tokens of text", ["model"])
        self.images = counter("prime_images", "Generated images", ["model"])
        self.scores = counter("prime_scores", "Scored texts and images", ["model"])

    def _build_engine_metrics(self) -> None:
        counter = partial(Counter, registry=self.registry, labelnames=["model"])
        histogram = partial(Histogram, registry=self.registry, labelnames=["model"])
        self.calls = counter("prime_denoiser_calls", "Calls of the denoiser")
        self.out_of_memory = counter("prime_out_of_memory", "Calls that ran out of memory")
        self.row_steps = counter("prime_row_steps", "Rows times calls")
        self.call_tokens = counter("prime_call_tokens", "Tokens of the rows of all calls")
        self.filling_tokens = counter("prime_call_filling_tokens", "Tokens that only fill calls up")
        self.row_steps_skipped = counter("prime_row_steps_skipped", "Steps of rows that cost no call")
        self.step_s = histogram(
            "prime_step_duration_seconds",
            "One denoiser call with its draws, without waiting for others",
            buckets=_STEP_S,
        )
        self.batch_rows = histogram("prime_batch_rows", "Rows of a denoiser call", buckets=_POWERS)
        self.padding_ratio = histogram(
            "prime_batch_padding_ratio", "Share of a call's tokens that only fill it up", buckets=_SHARES
        )
        self.reloads = Counter(
            "prime_model_reloads",
            "Checkpoints that were read again, by whether they were taken",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.model_up = Gauge(
            "prime_model_up", "1 in service, 0 given up after failures", ["model"], registry=self.registry
        )
        self.model_info = Gauge(
            "prime_model_info",
            "A loaded model",
            ["model", "kind", "dtype", "device"],
            registry=self.registry,
        )

    def add_model(
        self, name: str, kind: str, dtype: str, device: str, num_jobs: Callable[[], tuple[int, int]]
    ) -> None:
        """Create every series of a model.

        Args:
            name: of the model.
            kind: "text" or "images".
            dtype: of its weights.
            device: where it runs.
            num_jobs: gives the requests that run and that wait, whenever they are asked for.
        """
        self.model_info.labels(name, kind, dtype, device).set(1)
        self.model_up.labels(name).set(1)
        self.running.labels(name).set_function(lambda: num_jobs()[0])
        self.waiting.labels(name).set_function(lambda: num_jobs()[1])
        for finish in FINISHES[kind]:
            self.success.labels(name, finish)
        for outcome in ("taken", "refused"):
            self.reloads.labels(name, outcome)
        for failure in get_args(Failure):
            self.failed.labels(name, failure)
        self._create_rejections(name)
        of_kind = [self.images] if kind == "images" else [self.prompt_tokens, self.tokens]
        of_rows = [self.row_steps, self.row_steps_skipped, self.scores]
        of_calls = [self.calls, self.out_of_memory, self.call_tokens, self.filling_tokens]
        for counter in [*of_calls, *of_rows, *of_kind]:
            counter.labels(name)
        histograms = [
            self.latency_s,
            self.queue_s,
            self.nfe,
            self.step_s,
            self.batch_rows,
            self.padding_ratio,
        ]
        for histogram in histograms:
            histogram.labels(name)

    def _create_rejections(self, name: str) -> None:
        for rejection in get_args(Rejection):
            self.rejected.labels(name, rejection)

    def call_done(self, model: str, num_rows: int, num_tokens: int, num_filling: int, seconds: float) -> None:
        """Count one denoiser call over rows of ``num_tokens`` tokens together, filled up with ``num_filling``.

        It is only noted here, as the engine's thread has better to do; see `settle`.
        """
        self._calls.append(_Call(model, num_rows, num_tokens, num_filling, seconds))
        if len(self._calls) >= _MOST_NOTED:
            self.settle()

    def settle(self) -> None:
        """Count the calls that are noted, and wait for those that another thread is counting."""
        with self._settling:
            while self._calls:
                model, num_rows, num_tokens, num_filling, seconds = self._calls.popleft()
                calls, row_steps, call_tokens, filling_tokens, batch_rows, padding_ratio, step_s = (
                    self._of_calls(model)
                )
                calls.inc()
                row_steps.inc(num_rows)
                call_tokens.inc(num_tokens)
                filling_tokens.inc(num_filling)
                batch_rows.observe(num_rows)
                padding_ratio.observe(num_filling / (num_tokens + num_filling))
                step_s.observe(seconds)

    def _of_calls(self, model: str) -> Sequence[Any]:
        """Return a model's series of `call_done`: looking each up in every call costs as much as counting."""
        if model not in self._series_of_calls:
            counters = (self.calls, self.row_steps, self.call_tokens, self.filling_tokens)
            histograms = (self.batch_rows, self.padding_ratio, self.step_s)
            self._series_of_calls[model] = [each.labels(model) for each in (*counters, *histograms)]
        return self._series_of_calls[model]

    def request_done(
        self, model: str, finish: Finish, total_s: float, queue_s: float, rows: Sequence[tuple[int, int]]
    ) -> None:
        """Count a request that was answered.

        Args:
            model: which made the answer.
            finish: why its outputs end.
            total_s: arrival to answer.
            queue_s: arrival to the first denoiser call.
            rows: denoiser calls and skipped steps of each output.
        """
        self.success.labels(model, finish).inc()
        self.latency_s.labels(model).observe(total_s)
        self.queue_s.labels(model).observe(queue_s)
        for nfe, skipped in rows:
            self.nfe.labels(model).observe(nfe)
            self.row_steps_skipped.labels(model).inc(skipped)

    def reject(self, model: str, reason: Rejection) -> None:
        """Count a request that was refused before any work; the model is "" if it was not known yet."""
        self.rejected.labels(model, reason).inc()

    def fail(self, model: str, reason: Failure) -> None:
        """Count an accepted request that got no answer."""
        self.failed.labels(model, reason).inc()

    def render(self) -> bytes:
        """Return the Prometheus text format."""
        return generate_latest(self.registry)
