"""Whoever leaves, and when: every request that was taken has one outcome in the metrics, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from server.engine.batcher import Job
from server.http.body import Bodies
from server.http.leaving import CancelUnfinished
from server.metrics import Metrics
from tests.server.running import Running, assert_error, serving, wait_until

NUM_CLIENTS, NUM_REQUESTS = 6, 25  # of each client
OUTCOMES = ("prime_request_success_total", "prime_request_failure_total", "prime_rejected_total")

Make = Callable[[random.Random], tuple[str, dict[str, Any]]]
KINDS: list[Make] = [
    lambda r: ("/generate", {"max_tokens": r.randint(1, 12), "n": r.randint(1, 4), "steps": "exact"}),
    lambda r: ("/generate", {"max_tokens": r.randint(1, 12), "n": r.randint(1, 4), "stream": True}),
    lambda r: ("/generate", {"max_tokens": 10**6}),
    lambda r: ("/images", {"n": r.randint(1, 4), "steps": 8, "response_format": "grid"}),
    lambda r: ("/images", {"n": r.randint(1, 4), "steps": 8, "stream": True, "preview_every": 1}),
    lambda r: ("/score", {"inputs": ["abc", "de"], "num_samples": r.randint(1, 20)}),
    lambda r: ("/v1/completions", {"prompt": ["a", "b"], "n": 3, "stop": ["x"], "echo": True}),
    lambda r: ("/v1/completions", {"prompt": "a", "n": 3, "stop": ["x"], "stream": True}),
    lambda r: ("/v1/images/generations", {"prompt": "", "steps": 8, "stream": True, "partial_images": 2}),
]


def visit(server: Running, random_of_client: random.Random) -> None:
    """Send one request, and wait for its answer or leave: at once, or some time later."""
    path, body = random_of_client.choice(KINDS)(random_of_client)
    content = json.dumps(body).encode()
    limit = random_of_client.choice(["", "", "X-Request-Timeout: 0.05\r\n", "X-Request-Timeout: 0.2\r\n"])
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n{limit}"
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        leaves_after_s = random_of_client.choice([None, None, 0.003, 0.01, 0.03, 0.1])
        if leaves_after_s is not None:
            time.sleep(leaves_after_s)
            return
        while connection.recv(65536):
            pass


def samples_of(server: Running) -> list[Any]:
    return [sample for family in server.engine.metrics.registry.collect() for sample in family.samples]


def num_answered(server: Running) -> float:
    """Requests whose line is in the log; those that left before their body was read have come to no model."""
    counted = [each for each in samples_of(server) if each.name == "prime_http_requests_total"]
    return sum(each.value for each in counted)


def test_every_request_has_one_outcome_and_holds_nothing(
    model_path: Path, images_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bodies: list[Bodies] = []
    build = Bodies.__init__

    def noted(self: Bodies, *arguments: Any) -> None:
        build(self, *arguments)
        bodies.append(self)

    monkeypatch.setattr(Bodies, "__init__", noted)
    caplog.set_level("INFO", "prime.access")
    with serving(model_path, images_path, max_queue_rows=24, max_batch_rows=8) as server:
        for name in server.engine.queues:
            server.denoiser_of(name).hook = lambda lengths: time.sleep(0.002)

        def client(seed: int) -> None:
            random_of_client = random.Random(seed)
            for _ in range(NUM_REQUESTS):
                visit(server, random_of_client)

        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(NUM_CLIENTS)]
        for each in clients:
            each.start()
        while any(each.is_alive() for each in clients):
            time.sleep(0.1)
            for queue in server.engine.queues.values():
                queue.replace(queue.checkpoint)  # rows of two generations, again and again
        num_sent = NUM_CLIENTS * NUM_REQUESTS
        wait_until(lambda: num_answered(server) == num_sent)
        wait_until(lambda: server.engine.held_rows == 0)

        lines: list[dict[str, Any]] = [
            record.fields
            for record in caplog.records
            if record.name == "prime.access"  # type: ignore[attr-defined]
        ]
        num_taken = sum("model" in line for line in lines)
        assert num_taken > num_sent / 2
        outcomes = [each for each in samples_of(server) if each.name in OUTCOMES]
        assert sum(each.value for each in outcomes) == num_taken
        seen = {tuple(each.labels.values())[1] for each in outcomes if each.value}
        assert seen >= {"length", "complete", "cancelled", "invalid"}
        gauges = (
            "prime_num_requests_running",
            "prime_num_requests_waiting",
            "prime_http_requests_in_progress",
        )
        assert not any(each.value for each in samples_of(server) if each.name in gauges)
        assert server.engine._room._bytes == 0
        assert [each.held_bytes for each in bodies] == [0]
        assert all(not len(queue.batcher) and not queue.inbox for queue in server.engine.queues.values())
        wait_until(lambda: all(len(list(q._generations)) == 1 for q in server.engine.queues.values()))
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


def lines_until_it_breaks(response: httpx.Response) -> list[str]:
    lines = []
    with contextlib.suppress(httpx.RemoteProtocolError):
        for line in response.iter_lines():
            lines.append(line)
        pytest.fail("it came to a regular end")
    return lines


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("planted")


@pytest.mark.parametrize("name", ["prepare_text", "text_response"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_that_nobody_expected_is_told_and_counted_as_one(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stream: bool
) -> None:
    """Before the engine has the rows, and after it has finished them."""
    with serving(model_path) as server:
        monkeypatch.setattr(f"server.text.generate.{name}", fail)
        if stream and name == "text_response":
            with server.client.stream(
                "POST", "/generate", json={"max_tokens": 3, "stream": True}
            ) as response:
                lines = lines_until_it_breaks(response)
            assert lines[-3] == "event: error" and '"internal_error"' in lines[-2] and not lines[-1]
            assert "planted" not in "".join(lines)
        else:
            assert_error(server.post(max_tokens=3, stream=stream), 500, "internal_error")
        wait_until(lambda: server.metric("prime_request_failure_total", reason="internal_error") == 1)
        outcomes = [each for each in samples_of(server) if each.name in OUTCOMES]
        assert sum(each.value for each in outcomes) == 1
        wait_until(lambda: server.engine.held_rows == 0)


@pytest.mark.parametrize(
    ("error", "reason"), [(ClientDisconnect(), "cancelled"), (ZeroDivisionError(), "internal_error")]
)
def test_a_job_that_is_left_counts_by_what_has_ended_its_request(error: Exception, reason: str) -> None:
    async def fail(*_: Any) -> None:
        raise error

    metrics, job = Metrics(), Job("tiny", [], arrived_s=0.0)
    with pytest.raises(type(error)):
        asyncio.run(CancelUnfinished(fail, metrics)({"type": "http", "state": {"jobs": [job]}}, fail, fail))
    assert job.done.cancelled()
    labels = {"model": "tiny", "reason": reason}
    assert metrics.registry.get_sample_value("prime_request_failure_total", labels) == 1
