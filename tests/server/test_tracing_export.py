"""How spans come to a collector, and what happens when it is away."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.processes import Served

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.http.tracing import FLUSH_S

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@contextlib.contextmanager
def _collector() -> Iterator[tuple[str, list[bytes]]]:
    """A collector on the loopback interface: its URL, and the bodies that came."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", bodies
        finally:
            server.shutdown()
            thread.join(10)


def test_spans_of_a_server_come_to_a_collector_at_its_end(model_path: Path) -> None:
    # FastAPI has spans of its own, with paths and queries in them: none of them may come, even if they are asked for.
    native = {"FASTAPI_OTEL_AUTO_CONFIGURE": "true"}
    with (
        _collector() as (url, bodies),
        Served(
            *("--model", str(model_path), "--otlp-traces-endpoint", url),
            environment={**native, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url},
        ) as served,
    ):
        before_ns = time.time_ns()
        body = {"prompt": "secret", "max_tokens": 8, "n": 2, "seed": 1, "steps": 4}
        response = httpx.post(
            f"{served.url}/generate?secret=1",
            json=body,
            headers={"traceparent": TRACEPARENT, "x-request-id": "job-7", "authorization": "secret"},
            timeout=60,
        )
        streamed = httpx.post(
            f"{served.url}/generate",
            json={**body, "stream": True},
            headers={"x-request-id": "job-8"},
            timeout=60,
        )
        assert httpx.get(f"{served.url}/secret").status_code == 404
        after_ns = time.time_ns()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0, served.log
        assert "prime.tracing" not in served.log
    assert (response.status_code, streamed.status_code) == (200, 200)
    assert bodies and not any(b"secret" in body for body in bodies)
    spans = [
        span
        for body in bodies
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]
    phases = ["prepare", "queue", "run", "answer"]
    assert sorted(span.name for span in spans) == sorted(2 * ["POST /generate", *phases] + ["GET"])
    ours = [span for span in spans if span.trace_id.hex() == TRACE_ID]
    assert sorted(span.name for span in ours) == sorted(["POST /generate", *phases])
    by_name = {span.name: span for span in ours}
    root = by_name["POST /generate"]
    assert root.parent_span_id.hex() == PARENT_ID
    assert {by_name[name].parent_span_id for name in phases} == {root.span_id}
    assert before_ns - 1e6 < root.start_time_unix_nano < root.end_time_unix_nano < after_ns + 1e9
    at = [
        time_ns
        for name in phases
        for time_ns in (by_name[name].start_time_unix_nano, by_name[name].end_time_unix_nano)
    ]
    assert at == sorted(at)
    assert root.start_time_unix_nano <= at[0] and at[-1] == root.end_time_unix_nano
    cost = {each.key: each.value.int_value for each in by_name["run"].attributes}
    assert cost["prime.rows"] == 2
    assert cost["prime.nfe"] == sum(output["nfe"] for output in response.json()["outputs"])
    assert cost["prime.tokens"] == 2 * (len("secret") + 8)
    timings = response.json()["timings"]
    run = by_name["run"]
    assert (run.end_time_unix_nano - run.start_time_unix_nano) / 1e9 == pytest.approx(
        timings["run_s"], abs=1e-4
    )


@pytest.mark.parametrize("kind", ["refuses", "hangs"])
def test_a_collector_that_is_away_harms_nothing(model_path: Path, kind: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # without `listen`, connections are refused
        if kind == "hangs":
            held.listen()
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1/traces"
        # Batches of one span: each is a failure of its own.
        small = {
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1",
            "OTEL_BSP_MAX_QUEUE_SIZE": "4",
        }
        with Served("--model", str(model_path), "--otlp-traces-endpoint", url, environment=small) as served:
            bodies = [served.outputs(prompt="a", max_tokens=8, seed=1, steps=4) for _ in range(20)]
            assert all(body == bodies[0] for body in bodies)
            assert served.get("/health").status_code == 200
            served.signal(signal.SIGTERM)
            signalled_s = time.monotonic()
            assert served.wait() == 0, served.log
            # The SDK alone would wait for 30 s.
            assert time.monotonic() - signalled_s < FLUSH_S + 15
            lines = [line for line in served.log.splitlines() if "race" in line or "opentelemetry" in line]
            assert len(lines) == 1, served.log
            assert " WARNING prime.tracing traces may be lost: " in lines[0]
