"""Bytes that are no HTTP: one small answer or a closed connection, each with its line in the log."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.narrow import HEAD, connect, received, serving_narrowly
from tests.server.running import Running, assert_error, wait_until


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving_narrowly(model_path) as running:
        yield running


def test_what_is_not_http_is_answered_in_the_one_shape(server: Running) -> None:
    for sent in [b"\x16\x03\x01\x02\r\n\r\n", HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n"]:
        with connect(server) as connection:
            connection.sendall(sent)
            head, _, body = received(connection).partition(b"\r\n\r\n")
        status, *lines = head.decode().lower().split("\r\n")
        headers = dict(line.split(": ") for line in lines)
        assert headers["connection"] == "close"
        content = httpx.Response(int(status.split()[1]), headers=headers, content=body)
        assert_error(content, 400, "invalid_http")


def test_what_is_not_http_has_a_line_with_its_id_and_a_place_in_the_metrics(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prime.access")
    labels = {"route": "other", "method": "other", "status": "400"}
    registry = server.engine.metrics.registry
    before = registry.get_sample_value("prime_http_requests_total", labels) or 0
    with connect(server) as connection:
        connection.sendall(b"NOT HTTP\r\n\r\n")
        reply = received(connection).decode().lower()
    (request_id,) = re.findall(r"x-request-id: (\S+)", reply)
    lines = [record.getMessage() for record in caplog.records if record.name == "prime.access"]
    assert lines == [f"{request_id} other other 400 0.0 ms client=127.0.0.1"]
    assert registry.get_sample_value("prime_http_requests_total", labels) == before + 1


def test_the_id_of_a_body_that_breaks_off_is_that_of_its_request(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prime.access")
    with connect(server) as connection:
        connection.sendall(HEAD + b"X-Request-Id: mine\r\nTransfer-Encoding: chunked\r\n\r\n")
        time.sleep(0.2)
        connection.sendall(b"zz\r\n")
        assert b"x-request-id: mine\r\n" in received(connection).lower()
    wait_until(lambda: any(record.name == "prime.access" for record in caplog.records))
    lines = [record.getMessage() for record in caplog.records if record.name == "prime.access"]
    assert [line.split()[:4] for line in lines] == [["mine", "POST", "/generate", "400"]]


@pytest.mark.parametrize("route", ["POST /generate", "GET /health", "POST /nowhere"])
def test_a_body_that_is_bad_from_the_start_is_answered(
    server: Running, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    """Head and body come in one piece, so that the request has not even begun when its body turns out to be none."""
    caplog.set_level(logging.INFO, "prime.access")
    with connect(server) as connection:
        connection.sendall(
            f"{route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Request-Id: mine\r\n"
            "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n".encode()
        )
        reply = received(connection)
    assert reply.startswith(b"HTTP/1.1 400")
    assert reply.lower().count(b"x-request-id") == 1
    assert b"x-request-id: mine\r\n" in reply.lower()
    wait_until(lambda: any(record.name == "prime.access" for record in caplog.records))
    (line,) = (record.getMessage() for record in caplog.records if record.name == "prime.access")
    assert line.startswith("mine ") and " 400 " in line  # not 499: it was answered
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n",
        b"NOT HTTP\r\n\r\n",
    ],
)
def test_every_request_has_one_line_in_the_log(
    server: Running, caplog: pytest.LogCaptureFixture, request_bytes: bytes
) -> None:
    caplog.set_level(logging.INFO, "prime.access")
    with connect(server) as connection:
        connection.sendall(request_bytes)
        assert received(connection).startswith(b"HTTP/1.1 ")
    wait_until(lambda: any(record.name == "prime.access" for record in caplog.records))
    assert [record.name for record in caplog.records] == ["prime.access"]


def test_bad_bytes_after_half_an_answer_only_close(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD.replace(b"Content-Type", b"X") + b"Transfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 415")
        connection.sendall(b"zz\r\n")
        assert b"HTTP/1.1" not in received(connection)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"X-Long: " + b"a" * 1_000_000 + b"\r\n\r\n",
        HEAD + b"X: y\r\n" * 20_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_broken_http_is_closed(server: Running, request_bytes: bytes) -> None:
    with connect(server) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request_bytes)
        reply = received(connection)
    assert reply == b"" or reply.split()[1] in {b"400", b"408", b"422", b"431"}
    assert b"HTTP/1.1 200" not in reply
