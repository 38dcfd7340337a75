"""Traces: a span for each request, with its times in the engine below it, sent by OTLP over HTTP.

    POST /generate   prepare -> queue -> run -> answer

Spans are made when a request is over, from the times that were noted on its way, so nothing that answers requests
knows of them. This module imports OpenTelemetry's SDK, and is imported only where traces are asked for. Its provider is
not made the global one, at which other libraries of the process look: they would add paths and queries to the spans.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.batcher import Job
from server.http.access import Access
from server.http.http_metrics import OTHER

logger = logging.getLogger("prime.tracing")

FLUSH_S = 5.0  # for what is left when the server ends
MIN_INTERVAL_S = 60.0  # between two lines in the log
_NAME = "mdm-prime"
_MAX_TRACEPARENT_BYTES = 128  # version 00 has 55, later ones may have more


class OneLineAMinute(logging.Handler):
    """Passes the warnings of the library on, at most one a minute: it warns of each batch that cannot be sent."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told_s = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line of our own with the message of a record."""
        self.tell(record.getMessage())

    def tell(self, why: str) -> None:
        """Write that traces are lost, and why."""
        now_s = time.monotonic()
        if now_s - self._told_s >= MIN_INTERVAL_S:
            self._told_s = now_s
            logger.warning("traces may be lost: %s", why)


class Tracing:
    """Makes spans of requests and hands them to a processor, which sends them from a thread of its own."""

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        """Begin to trace; `close` ends it.

        Args:
            processor: what becomes of the spans.
            version: of this server.
        """
        ours = Resource({"service.name": _NAME, "service.version": version})
        # The variables of OpenTelemetry (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) have the last word.
        resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # `close` has a limit
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_NAME, version)
        self._lost = OneLineAMinute()
        library = logging.getLogger("opentelemetry")
        library.addHandler(self._lost)
        library.propagate = False

    @classmethod
    def to(cls, endpoint: str, version: str) -> Tracing:
        """Trace to a collector; one that is away costs its spans and nothing else.

        Args:
            endpoint: URL that takes OTLP over HTTP; headers and such are in the OTEL_EXPORTER_OTLP_... variables.
            version: of this server.
        """
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), version)

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Send what is left, and wait for it no longer than so many seconds."""
        # The SDK has limits of its own, which are longer and not the same in all versions.
        sending = threading.Thread(target=self._provider.shutdown, name="prime-tracing", daemon=True)
        sending.start()
        sending.join(timeout_s)
        if sending.is_alive():
            self._lost.tell(f"the last ones could not be sent in {timeout_s:g} s")
        library = logging.getLogger("opentelemetry")
        library.removeHandler(self._lost)
        library.propagate = True

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return an app that traces the requests of another, in which `AccessMiddleware` is."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            failure = None
            try:
                await app(scope, receive, send)
            except BaseException as error:
                failure = type(error).__name__
                raise
            finally:
                if "access" in scope.get("state", {}):
                    self._trace(scope, failure)

        return traced

    def _trace(self, scope: Scope, failure: str | None) -> None:
        """Make the spans of a request that is over; nothing in them is a text that a client chose, but for its ids."""
        access: Access = scope["state"]["access"]
        # Taken once for all spans of a request: the clock may be set while it runs.
        offset_ns = time.time_ns() - time.monotonic_ns()
        root = self._start_root(scope, offset_ns)
        below = set_span_in_context(root, Context())
        for job in scope["state"].get("jobs", []):
            for name, start_s, end_s in _phases(job, access.finished_s):
                attributes = _work(job) if name == "run" else None
                span = self._tracer.start_span(
                    name, below, start_time=_ns(start_s, offset_ns), attributes=attributes
                )
                span.end(_ns(end_s, offset_ns))
        if failure is not None or access.status >= 500:
            root.set_attribute("error.type", failure or str(access.status))
            root.set_status(StatusCode.ERROR)
        root.end(_ns(access.finished_s, offset_ns))

    def _start_root(self, scope: Scope, offset_ns: int) -> Span:
        """Return the span of a whole request, below that of the client if it names one."""
        state = scope["state"]
        access: Access = state["access"]
        method, verb = ("_OTHER", "HTTP") if access.method == OTHER else (access.method, access.method)
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "url.scheme": scope["scheme"],
            "prime.request_id": state["request_id"],
        }
        if access.route != OTHER:
            attributes["http.route"] = access.route
        if access.status:
            attributes["http.response.status_code"] = access.status
        if "model" in state:
            attributes["gen_ai.request.model"] = state["model"]
        root: Span = self._tracer.start_span(
            verb if access.route == OTHER else f"{verb} {access.route}",
            _parent_of(scope),
            kind=SpanKind.SERVER,
            start_time=_ns(access.started_s, offset_ns),
            attributes=attributes,
        )
        return root


def _phases(job: Job, end_s: float) -> Iterator[tuple[str, float, float]]:
    """Yield what became of a job until its request ended: name, begin and end of each phase that it came to.

    Args:
        job: whose client may have gone before it was finished.
        end_s: `time.monotonic()` of the end.
    """
    begins = [
        ("prepare", job.arrived_s),
        ("queue", job.submitted_s),
        ("run", job.started_s),
        ("answer", job.finished_s),
    ]
    come = [(name, begin_s) for name, begin_s in begins if begin_s is not None and begin_s <= end_s]
    for (name, begin_s), (_, next_s) in zip(come, [*come[1:], ("", end_s)], strict=True):
        yield name, begin_s, next_s


def _work(job: Job) -> dict[str, str | int]:
    """Return what a job cost the engine so far; tokens are those of all its rows, given and sampled."""
    return {
        "gen_ai.request.model": job.model,
        "prime.rows": len(job.rows),
        "prime.nfe": sum(row.next_event for row in job.rows),
        "prime.tokens": sum(row.length for row in job.rows),
    }


def _parent_of(scope: Scope) -> Context:
    """Return the trace that a client asks to be part of. Its tracestate is not taken: that is free text."""
    given = [value for name, value in scope["headers"] if name == b"traceparent"]
    if len(given) != 1 or len(given[0]) > _MAX_TRACEPARENT_BYTES:
        return Context()
    return TraceContextTextMapPropagator().extract({"traceparent": given[0].decode("latin-1")}, Context())


def _ns(monotonic_s: float, offset_ns: int) -> int:
    """Return the nanoseconds since 1970 of a time of `time.monotonic()`."""
    return round(monotonic_s * 1e9) + offset_ns
