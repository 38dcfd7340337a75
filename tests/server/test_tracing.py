"""Spans of requests: their names, times and attributes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.batcher import Job
from server.http.access import AccessMiddleware
from server.metrics import Metrics

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.http.tracing import Tracing

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01".encode()


class _Row:
    """What a span tells of a row."""

    def __init__(self, length: int, next_event: int) -> None:
        self.length, self.next_event = length, next_event


def _job(**times_s: float | None) -> Job:
    rows: Any = [_Row(20, 3), _Row(30, 4)]
    return Job("tiny", rows, **times_s)  # type: ignore[arg-type]


def _app(status: int = 200, jobs: list[Job] | None = None, error: BaseException | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if jobs is not None:
            scope["state"] |= {"jobs": jobs, "model": "tiny", "key_name": "secret-name"}
        await send({"type": "http.response.start", "status": status, "headers": []})
        if error is not None:
            raise error
        await send({"type": "http.response.body", "body": b""})

    return app


def _spans(
    app: ASGIApp, *headers: tuple[bytes, bytes], method: str = "POST", path: str = "/generate"
) -> dict[str, ReadableSpan]:
    """Serve one request, and return its spans by name."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter), "1.2")
    scope = {
        "type": "http",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"secret=query",
        "headers": [(b"x-request-id", b"job-7"), (b"user-agent", b"secret"), *headers],
    }

    async def silent(*arguments: Any) -> Any:
        return None

    try:
        inner = AccessMiddleware(app, Metrics().http, ["/generate"])
        with contextlib.suppress(RuntimeError):
            asyncio.run(tracing.around(inner)(scope, silent, silent))  # type: ignore[arg-type]
        spans = exporter.get_finished_spans()
        assert len({span.name for span in spans}) == len(spans)
        return {span.name: span for span in spans}
    finally:
        tracing.close()


def test_a_request_has_one_span_with_its_phases_below() -> None:
    now_s = time.monotonic()
    job = _job(arrived_s=now_s - 4, submitted_s=now_s - 3.5, started_s=now_s - 2, finished_s=now_s - 1)
    spans = _spans(_app(jobs=[job]))
    after_ns = time.time_ns()
    assert set(spans) == {"POST /generate", "prepare", "queue", "run", "answer"}
    root = spans.pop("POST /generate")
    assert (root.kind, root.parent, root.status.status_code) == (SpanKind.SERVER, None, StatusCode.UNSET)
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "gen_ai.request.model": "tiny",
        "prime.request_id": "job-7",
    }
    assert {name: dict(span.attributes or {}) for name, span in spans.items()} == {
        "prepare": {},
        "queue": {},
        "run": {"gen_ai.request.model": "tiny", "prime.rows": 2, "prime.nfe": 7, "prime.tokens": 50},
        "answer": {},
    }
    assert {span.parent and span.parent.span_id for span in spans.values()} == {root.context.span_id}
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}  # type: ignore[operator]
    answer_s = seconds.pop("answer")
    assert seconds == pytest.approx({"prepare": 0.5, "queue": 1.5, "run": 1.0}, abs=1e-6)
    assert 1.0 <= answer_s < 60
    ends = [spans[name].end_time for name in ("prepare", "queue", "run")]
    assert ends == [spans[name].start_time for name in ("queue", "run", "answer")]
    assert spans["answer"].end_time == root.end_time
    # The times are those of the wall clock.
    assert root.start_time is not None and root.end_time is not None
    assert after_ns - 60e9 < root.start_time <= root.end_time <= after_ns + 1e6


def test_a_job_that_is_left_has_the_phases_that_it_came_to() -> None:
    now_s = time.monotonic()
    begun = {"arrived_s": now_s - 4, "submitted_s": now_s - 3}
    assert set(_spans(_app(jobs=[_job(**begun)]))) == {"POST /generate", "prepare", "queue"}
    running = _job(**begun, started_s=now_s - 2)
    assert set(_spans(_app(jobs=[running]))) == {"POST /generate", "prepare", "queue", "run"}
    # The engine was done with it after its client had gone.
    late = _job(**begun, started_s=now_s - 2, finished_s=now_s + 1000)
    spans = _spans(_app(jobs=[late]))
    assert set(spans) == {"POST /generate", "prepare", "queue", "run"}
    assert spans["run"].end_time == spans["POST /generate"].end_time
    expired = _job(**begun, finished_s=now_s - 1)
    assert set(_spans(_app(jobs=[expired]))) == {"POST /generate", "prepare", "queue", "answer"}


@pytest.mark.parametrize(
    ("app", "status", "error_type"),
    [
        (_app(503), 503, "503"),
        (_app(error=ZeroDivisionError("secret")), 500, "HalfAnswerError"),
        (_app(422), 422, None),
    ],
)
def test_failures_of_the_server_are_errors(app: ASGIApp, status: int, error_type: str | None) -> None:
    (span,) = _spans(app).values()
    attributes = span.attributes or {}
    assert (attributes["http.response.status_code"], attributes.get("error.type")) == (status, error_type)
    assert span.status.status_code is (StatusCode.UNSET if error_type is None else StatusCode.ERROR)
    assert "secret" not in span.to_json()


def test_what_was_not_answered_has_no_status() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        return

    (span,) = _spans(silent).values()
    assert "http.response.status_code" not in (span.attributes or {})


def test_nothing_that_a_client_wrote_is_in_a_span() -> None:
    ((name, span),) = _spans(_app(404), method="SECRET", path="/secret").items()
    assert name == "HTTP"
    assert span.attributes == {
        "http.request.method": "_OTHER",
        "http.response.status_code": 404,
        "url.scheme": "http",
        "prime.request_id": "job-7",
    }
    given = [(b"traceparent", TRACEPARENT), (b"tracestate", b"secret=1"), (b"baggage", b"secret=1")]
    for span in _spans(_app(jobs=[_job(arrived_s=0.0)]), *given).values():
        assert "secret" not in span.to_json()


def test_a_traceparent_is_honoured() -> None:
    spans = _spans(_app(jobs=[_job(arrived_s=time.monotonic())]), (b"traceparent", TRACEPARENT))
    assert set(spans) == {"POST /generate", "prepare"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE_ID}
    parent = spans["POST /generate"].parent
    assert parent is not None and parent.is_remote and f"{parent.span_id:016x}" == PARENT_ID
    # Its last bit says whether the client records the trace.
    assert not _spans(_app(), (b"traceparent", TRACEPARENT[:-1] + b"0"))


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b"x"],
        [b"\xff" * 55],
        [TRACEPARENT.replace(b"4", b"g")],
        [b"00-" + b"0" * 32 + TRACEPARENT[35:]],
        [TRACEPARENT + b"-1"],
        [TRACEPARENT.replace(b"00-4", b"ff-4")],
        [TRACEPARENT, TRACEPARENT],
        [b"01" + TRACEPARENT[2:] + b"-" + b"a" * 60000],
    ],
)
def test_a_traceparent_that_is_none_begins_a_new_trace(
    values: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (span,) = _spans(_app(), *[(b"traceparent", value) for value in values]).values()
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" not in {TRACE_ID, "0" * 32}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_variables_of_the_sdk_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    (span,) = _spans(_app()).values()
    assert span.resource.attributes["service.name"] == "mdm-prime"
    assert span.resource.attributes["service.version"] == "1.2"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "bible")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    (span,) = _spans(_app()).values()
    assert span.resource.attributes["service.name"] == "bible"
    assert span.resource.attributes["deployment.environment"] == "test"


def test_warnings_of_the_library_are_one_line_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing = Tracing(SimpleSpanProcessor(InMemorySpanExporter()), "0")
    library = logging.getLogger("opentelemetry.sdk.some")
    now_s = [1000.0]
    monkeypatch.setattr("server.http.tracing.time.monotonic", lambda: now_s[0])
    try:
        for now_s[0] in (1000.0, 1001.0, 1059.9, 1060.0, 1061.0):
            library.warning("at %g", now_s[0])
            library.info("nothing")
    finally:
        monkeypatch.undo()
        tracing.close()
    lines = [(record.name, record.getMessage()) for record in caplog.records]
    assert lines == [("prime.tracing", f"traces may be lost: at {at}") for at in (1000, 1060)]
    library.warning("as before")
    assert caplog.records[-1].name == "opentelemetry.sdk.some"


def test_the_end_waits_for_no_collector_longer_than_it_says(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    class Stuck(SimpleSpanProcessor):
        def shutdown(self) -> None:
            assert released.wait(60)

    tracing = Tracing(Stuck(InMemorySpanExporter()), "0")
    begun_s = time.monotonic()
    tracing.close(timeout_s=0.2)
    released.set()
    assert 0.2 <= time.monotonic() - begun_s < 30
    assert caplog.messages == ["traces may be lost: the last ones could not be sent in 0.2 s"]
