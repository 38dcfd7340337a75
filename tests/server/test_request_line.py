"""The line that a request begins with: its method, its target in either form, and an empty line before it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.narrow import connect, received, serving_narrowly
from tests.server.running import Running, assert_error, wait_until


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving_narrowly(model_path) as running:
        yield running


def test_wrong_methods_and_paths(server: Running) -> None:
    for method in ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"]:
        response = server.client.request(method, "/generate")
        assert_error(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST"
    for path in ["/nope", "/generate/x", "/../etc/passwd", "/%2e%2e/x", "/" + "a" * 5000]:
        assert_error(server.client.get(path), 404, "not_found")
    assert_error(server.client.post("/generate/", json={}), 404, "not_found")


def test_head_is_answered_wherever_get_is_but_of_images(server: Running) -> None:
    paths = [
        "/",
        "/health",
        "/ready",
        "/info",
        "/metrics",
        "/v1/models",
        "/v1/models/tiny",
        "/docs",
        "/openapi.json",
    ]
    for path in [*paths, "/playground/app.js"]:
        asked, head = server.client.get(path), server.client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == asked.headers["content-type"]
        if path != "/metrics":  # it has counted the one before
            assert head.headers["content-length"] == asked.headers["content-length"]
        assert server.client.request("DELETE", path).headers["allow"] == "GET, HEAD"
    for path, allow in [("/images", "GET, POST"), ("/generate", "POST")]:
        response = server.client.head(path)
        assert (response.status_code, response.content, response.headers["allow"]) == (405, b"", allow)
    assert server.client.head("/nowhere").status_code == 404


def test_head_is_counted_by_its_route(server: Running) -> None:
    labels = {"route": "/v1/models/{name:path}", "method": "HEAD", "status": "200"}
    registry = server.engine.metrics.registry
    before = registry.get_sample_value("prime_http_requests_total", labels) or 0
    server.client.head("/v1/models/tiny")
    wait_until(lambda: registry.get_sample_value("prime_http_requests_total", labels) == before + 1)


def test_head_that_fails_is_counted_by_its_route_too(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"route": "/v1/models/{name:path}", "method": "HEAD", "status": "500"}
    registry = server.engine.metrics.registry
    monkeypatch.setattr("server.routes.models.Response", lambda *_, **__: 1 / 0)
    assert server.client.head("/v1/models/tiny").status_code == 500
    wait_until(lambda: registry.get_sample_value("prime_http_requests_total", labels) == 1)


def read_answer(connection: socket.socket) -> bytes:
    """One answer, whose body ends with its brace."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part
        answer += part
    return answer


@pytest.mark.parametrize("split", [False, True])
def test_an_empty_line_before_a_request_is_none_of_it(server: Running, split: bool) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as connection:
        for _ in range(2):  # also on a connection that is kept
            connection.sendall(b"\r\n" if split else b"\r\n" + request)
            if split:
                time.sleep(0.05)
                connection.sendall(request)
            assert read_answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n\r\n" + request)  # one is enough
        assert read_answer(connection).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://prime.localhost:8000/health", 200),
        ("http://prime.localhost:8000/v1/models/tiny?a=1", 200),
        ("http://prime.localhost:8000/v1/models/t%69ny", 200),
        ("http://prime.localhost:8000", 200),
        ("http://prime.localhost:8000/nowhere", 404),
        ("HTTP://prime.localhost/health", 200),
        ("https://prime.localhost/health", 200),
        ("ftp://prime.localhost/health", 404),
    ],
)
def test_a_target_may_be_in_absolute_form(server: Running, target: str, status: int) -> None:
    with connect(server) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 %d" % status)


def test_the_host_of_an_absolute_target_counts(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(
            b"GET http://prime.localhost/docs HTTP/1.1\r\nHost: other.localhost\r\nConnection: close\r\n\r\n"
        )
        assert b"curl http://prime.localhost/health" in received(connection)
