"""Health, readiness, /info and /metrics."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import httpx
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from tests.server.running import CONTEXT, Running, wait_until


def series(server: Running) -> dict[str, float]:
    response = server.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == CONTENT_TYPE_LATEST
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_health_and_ready(server: Running) -> None:
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"status": "ready"}


def test_a_second_request_on_a_connection_does_not_wait_for_an_acknowledgement(server: Running) -> None:
    durations_s = []
    for _ in range(20):
        started_s = time.perf_counter()
        server.client.get("/health")
        durations_s.append(time.perf_counter() - started_s)
    assert min(durations_s) < 0.03  # with Nagle's algorithm all of them take over 0.04 s


def test_info_says_what_is_loaded_and_no_path(server: Running) -> None:
    response = server.client.get("/info")
    info = response.json()
    (model,) = info["models"]
    assert (model["name"], model["kind"], model["tokenizer"]) == ("tiny", "text", "tiktoken_file")
    assert model["codec"] == {"vocab_size": 257, "target_length": 2, "permuted": False, "base": 17}
    assert model["schedule"] == {"kind": "linear", "eps": 1e-3}
    assert model["network"]["hidden_size"] == 32
    assert (model["dtype"], model["device"], model["in_service"]) == ("float32", "cpu", True)
    assert model["limits"] == {"context": CONTEXT, "vocab_size": 257, "max_chars": CONTEXT}
    assert model["num_parameters"] == sum(each.numel() for each in server.denoiser.parameters())
    shared = ["max_n", "max_steps", "max_work", "max_body_bytes", "max_batch_rows", "max_batch_tokens"]
    for name in [*shared, "max_queue_rows", "max_queue_bytes"]:
        assert info["limits"][name] == getattr(server.settings, name), name
    assert (info["limits"]["max_stops"], info["limits"]["max_stop_chars"]) == (8, 256)
    assert info["versions"].keys() == {"python", "torch"}
    assert str(server.settings.model[0].path.parent) not in response.text


def test_metrics_count_what_happened(server: Running) -> None:
    before = series(server)
    body = server.post(prompt="abc", max_tokens=10, n=3, steps=6, seed=1).json()
    after = series(server)

    def grown(name: str) -> float:
        return after[name] - before[name]

    rows = body["outputs"]
    reason = "stop" if all(row["finish_reason"] == "stop" for row in rows) else "length"
    assert grown(f"prime_request_success_total[('finished_reason', '{reason}'), ('model', 'tiny')]") == 1
    assert grown("prime_row_steps_total[('model', 'tiny')]") == sum(row["nfe"] for row in rows)
    assert grown("prime_row_steps_skipped_total[('model', 'tiny')]") == sum(
        row["steps_skipped"] for row in rows
    )
    assert grown("prime_request_nfe_count[('model', 'tiny')]") == 3
    assert grown("prime_denoiser_calls_total[('model', 'tiny')]") == max(row["nfe"] for row in rows)
    assert grown("prime_step_duration_seconds_count[('model', 'tiny')]") == grown(
        "prime_batch_rows_count[('model', 'tiny')]"
    )
    assert grown("prime_batch_rows_sum[('model', 'tiny')]") == grown(
        "prime_row_steps_total[('model', 'tiny')]"
    )
    assert grown("prime_batch_padding_ratio_count[('model', 'tiny')]") == grown(
        "prime_batch_rows_count[('model', 'tiny')]"
    )
    assert grown("prime_generation_tokens_total[('model', 'tiny')]") == body["usage"]["completion_tokens"]
    assert grown("prime_prompt_tokens_total[('model', 'tiny')]") == 3
    assert grown("prime_e2e_request_latency_seconds_count[('model', 'tiny')]") == 1
    assert grown("prime_request_queue_time_seconds_count[('model', 'tiny')]") == 1
    assert (
        after["prime_num_requests_running[('model', 'tiny')]"]
        == after["prime_num_requests_waiting[('model', 'tiny')]"]
        == 0
    )
    assert (
        after[
            "prime_model_info[('device', 'cpu'), ('dtype', 'float32'), ('kind', 'text'), ('model', 'tiny')]"
        ]
        == 1
    )


NUM_ODD = int(os.environ.get("MDM_ODD_REQUESTS", "2000"))


def odd_requests(number: int) -> Iterator[bytes]:
    """Requests that differ in every place where a client can write something."""
    head = f"HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: id{number}\r\nContent-Type: application/json\r\n"
    yield f"GET /path{number}?q={number} {head}\r\n".encode()
    yield f"M{number} /generate {head}\r\n".encode()
    for body in (json.dumps({"model": f"model{number}"}), json.dumps({f"key{number}": 1})):
        yield f"POST /generate {head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def send_odd_requests(server: Running, numbers: Sequence[int]) -> int:
    """Send them one after the other over one connection; return how many were answered."""
    address, num_answers = httpx.URL(server.url), 0
    with socket.create_connection((address.host, address.port), 60) as connection:
        answers = connection.makefile("rb")
        for request in itertools.chain.from_iterable(map(odd_requests, numbers)):
            connection.sendall(request)
            length = 0
            while (line := answers.readline().lower()) not in (b"\r\n", b""):
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            num_answers += len(answers.read(length)) == length > 0
    return num_answers


def test_fault_18_nothing_that_a_client_sends_becomes_a_series(server: Running) -> None:
    assert send_odd_requests(server, [0]) == 4
    series(server)
    wait_until(
        lambda: "prime_http_requests_total[('method', 'GET'), ('route', '/metrics')" in str(series(server))
    )
    before = series(server).keys()
    assert send_odd_requests(server, range(1, 1 + NUM_ODD // 4)) == NUM_ODD // 4 * 4
    assert series(server).keys() == before


def test_http_requests_are_counted_by_route_method_and_status(server: Running) -> None:
    def count(route: str, method: str, status: str) -> float:
        labels = {"route": route, "method": method, "status": status}
        return server.engine.metrics.registry.get_sample_value("prime_http_requests_total", labels) or 0

    for method, path, route, status in [
        ("GET", "/health", "/health", "200"),
        ("POST", "/generate", "/generate", "422"),
        ("DELETE", "/generate", "/generate", "405"),
        ("GET", "/generate/nowhere", "other", "404"),
        ("BREW", "/info", "/info", "405"),
    ]:
        key = (route, "other" if method == "BREW" else method, status)
        before = count(*key)
        server.client.request(method, path, json={"n": 0} if method == "POST" else None)
        wait_until(lambda key=key, before=before: count(*key) == before + 1)  # type: ignore[misc]
    assert "prime_http_requests_in_progress 1.0" in server.client.get("/metrics").text  # the one that asks
    total = series(server)["prime_http_request_duration_seconds_count[('route', '/health')]"]
    assert total == count("/health", "GET", "200") >= 1


OF_THE_CONTRACT = """
num_requests_running num_requests_waiting request_success_total rejected_total e2e_request_latency_seconds_bucket
request_queue_time_seconds_bucket request_nfe_bucket generation_tokens_total images_total denoiser_calls_total
row_steps_total row_steps_skipped_total step_duration_seconds_bucket batch_rows_bucket batch_padding_ratio_bucket
model_info http_requests_total http_request_duration_seconds_bucket http_requests_in_progress
"""


def test_every_metric_of_the_contract_is_there(both: Running) -> None:
    both.client.get("/health")
    there = {name.partition("[")[0] for name in series(both)}
    assert {f"prime_{name}" for name in OF_THE_CONTRACT.split()} <= there


def test_padding_is_the_share_of_tokens_that_only_fill_a_call_up() -> None:
    metrics = Metrics()
    metrics.call_done("a", 2, 17, 15, 0.1)
    metrics.call_done("a", 1, 128, 0, 0.1)  # full as it is
    labels = {"model": "a"}
    ratio = metrics.registry.get_sample_value("prime_batch_padding_ratio_sum", labels)
    assert ratio == pytest.approx(15 / 32)
    assert metrics.registry.get_sample_value("prime_batch_padding_ratio_count", labels) == 2


def test_a_scrape_misses_no_call_that_another_thread_is_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    counting, go_on = threading.Event(), threading.Event()
    series_of = metrics._of_calls

    def held_up(model: str) -> Sequence[Any]:
        if not counting.is_set():
            counting.set()
            assert go_on.wait(60)
        return series_of(model)

    monkeypatch.setattr(metrics, "_of_calls", held_up)
    for _ in range(3):
        metrics.call_done("a", 1, 16, 0, 0.1)
    with ThreadPoolExecutor() as threads:
        threads.submit(metrics.settle)
        assert counting.wait(60)
        labels = {"model": "a"}
        scrape = threads.submit(metrics.registry.get_sample_value, "prime_denoiser_calls_total", labels)
        wait([scrape], timeout=0.2)
        go_on.set()
        assert scrape.result(60) == 3
