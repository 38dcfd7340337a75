"""Bytes that are no decent request: one small answer or a closed connection, and the server goes on."""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.http.body import DISCARD_BYTES
from server.http.json_text import parse_json
from tests.server.running import Running, assert_error, serving, wait_until

JSON = {"content-type": "application/json"}
LIMIT = 4096


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving(model_path, max_body_bytes=LIMIT, receive_timeout_s=1.0) as running:
        before = running.post(prompt="canary", max_tokens=4, seed=1).json()["outputs"]
        yield running
        assert running.post(prompt="canary", max_tokens=4, seed=1).json()["outputs"] == before
        assert running.engine.held_rows == 0


def post(server: Running, content: bytes, headers: dict[str, str]) -> httpx.Response:
    return server.client.post("/generate", content=content, headers=headers)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"{} {}", 400, "invalid_json"),
        (b"\xef\xbb\xbf{}", 400, "invalid_json"),
        (b'{"prompt": "a\nb"}', 400, "invalid_json"),
        (b'{"prompt": "\xff"}', 400, "invalid_utf8"),
        ("{}".encode("utf-16"), 400, "invalid_utf8"),
        (b"[" * LIMIT, 400, "invalid_json"),
        (b'{"n":' * 800 + b"1" + b"}" * 80, 400, "invalid_json"),
        (b"[]", 422, "invalid_body"),
        (b"null", 422, "invalid_body"),
        (b'"n"', 422, "invalid_body"),
        (b'{"n": 1, "n": 2}', 422, "duplicate_key"),
        (b'{"n": 1, "\\u006e": 1}', 422, "duplicate_key"),
        (b'{"template": [{"gap": 1, "gap": 2}]}', 422, "duplicate_key"),
    ],
)
def test_bad_bodies(server: Running, content: bytes, status: int, code: str) -> None:
    assert_error(post(server, content, JSON), status, code)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/jsonx"},
    ],
)
def test_wrong_types(server: Running, headers: dict[str, str]) -> None:
    assert_error(post(server, b"{}", headers), 415, "unsupported_media_type")


def test_charset_utf8_is_a_right_type(server: Running) -> None:
    response = post(server, b'{"max_tokens": 1}', {"content-type": 'Application/JSON; charset="UTF-8"'})
    assert response.status_code == 200


def test_compressed_bodies(server: Running) -> None:
    body = gzip.compress(b'{"max_tokens": 1}')
    assert_error(post(server, body, {**JSON, "content-encoding": "gzip"}), 415, "unsupported_encoding")


def test_integers_of_more_than_64_bits_are_no_numbers() -> None:
    assert parse_json(b"[18446744073709551615, -18446744073709551615]") == [2**64 - 1, 1 - 2**64]
    for text in [
        b"18446744073709551616",
        b"-18446744073709551616",
        b"99999999999999999999",
        b"1" + b"0" * 30,
    ]:
        value = parse_json(text)
        assert isinstance(value, float)
        assert math.isnan(value)


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


def test_body_over_the_limit_with_content_length(server: Running) -> None:
    exact = b'{"max_tokens": 1}'.ljust(LIMIT)
    assert post(server, exact, JSON).status_code == 200
    response = post(server, exact + b" ", JSON)
    assert str(LIMIT) in assert_error(response, 413, "body_too_large")
    assert response.headers["connection"] == "close"
    assert_error(post(server, b" " * 4_000_000, JSON), 413, "body_too_large")


def test_body_over_the_limit_in_chunks(server: Running) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    response = server.client.post("/generate", content=chunks(), headers=JSON)
    assert_error(response, 413, "body_too_large")


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # before connecting: else it grows
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


@pytest.mark.parametrize(
    "sent",
    [
        b"Transfer-Encoding: chunked\r\n\r\n1001\r\n" + b" " * (LIMIT + 1) + b"\r\n",
        b"Content-Length: %d\r\n\r\n{" % (LIMIT + 1),
    ],
)
def test_a_body_that_is_known_to_be_too_large_gets_413_also_if_its_end_never_comes(
    server: Running, sent: bytes
) -> None:
    assert LIMIT + 1 == 0x1001
    with connect(server) as connection:
        connection.sendall(HEAD + sent)
        reply = received(connection)
    assert reply.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in reply


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_client_that_waits_for_leave_gets_413_at_once(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
        reply = received(connection)
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in reply


def test_a_huge_declared_length_gets_413_at_once(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (LIMIT + DISCARD_BYTES + 1))
        reply = received(connection)
    assert reply.startswith(b"HTTP/1.1 413")  # not 408, after the time to receive
    assert b'"code":"body_too_large"' in reply


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


def ask_for_megabytes(connection: socket.socket, server: Running) -> int:
    """Ask many times for a page without reading; return the number of bytes of all answers at least."""
    page = b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n"
    each = len(server.client.get("/docs").content)
    num_pages = 4_000_000 // each + 1
    connection.sendall(page * num_pages)
    return each * num_pages


def read_slowly(connection: socket.socket, until: int) -> int:
    """Read up to about 1 MB/s; return how many bytes came before `until` or the end."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while count < until and (part := connection.recv(65536)):
            count += len(part)
            time.sleep(len(part) / 2**20)
    return count


def test_a_client_that_reads_nothing_is_cut_off(server: Running) -> None:
    with connect(server) as connection:
        asked = ask_for_megabytes(connection, server)
        time.sleep(3)  # time to receive: 1
        assert server.post(max_tokens=1).status_code == 200
        assert read_slowly(connection, asked) < asked


def test_a_client_that_reads_slowly_gets_all(server: Running) -> None:
    with connect(server) as connection:
        asked = ask_for_megabytes(connection, server)
        started = time.monotonic()
        assert read_slowly(connection, asked) == pytest.approx(asked, abs=65536)
        assert time.monotonic() - started > 3  # more than the time for a client that stands still


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"POST /gen", None),
        (HEAD, None),
        (HEAD + b"Content-Length: 10\r\n\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"408"),
    ],
)
def test_slow_clients_are_cut_off(server: Running, sent: bytes, status: bytes | None) -> None:
    started = time.monotonic()
    with connect(server) as connection:
        connection.sendall(sent)
        assert server.post(max_tokens=1).status_code == 200  # others are served meanwhile
        reply = received(connection)
    assert 0.5 < time.monotonic() - started < 14  # an idle connection would be kept for 15 s
    if status is None:
        assert reply == b""
    else:
        assert reply.startswith(b"HTTP/1.1 " + status)
        assert b'"code":"receive_timeout"' in reply


def test_a_trickling_head_is_cut_off_after_an_answer_too(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        try:
            while time.monotonic() - started < 14:
                connection.sendall(b"G")
                time.sleep(0.1)
            pytest.fail("the connection was kept")
        except (BrokenPipeError, ConnectionResetError):
            pass


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


def test_an_empty_line_alone_does_not_keep_a_connection(server: Running) -> None:
    started = time.monotonic()
    with connect(server) as connection:
        connection.sendall(b"\r\n")
        assert received(connection) == b""
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("target", "status"), [("/health", 200), ("/v1/models/tiny?a=1", 200), ("", 200), ("/nowhere", 404)]
)
def test_a_target_may_be_in_absolute_form(server: Running, target: str, status: int) -> None:
    with connect(server) as connection:
        connection.sendall(
            f"GET http://prime.localhost:8000{target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 %d" % status)


def test_the_host_of_an_absolute_target_counts(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(
            b"GET http://prime.localhost/docs HTTP/1.1\r\nHost: other.localhost\r\nConnection: close\r\n\r\n"
        )
        assert b"curl http://prime.localhost/health" in received(connection)
