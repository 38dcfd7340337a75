"""Bodies that are no decent JSON of the right type and size: one small answer each, at once."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.http.body import DISCARD_BYTES
from tests.server.narrow import HEAD, LIMIT, connect, received, serving_narrowly
from tests.server.running import Running, assert_error

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving_narrowly(model_path) as running:
        yield running


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


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_an_encoding_that_is_none_is_read(server: Running, encoding: str) -> None:
    response = post(server, b'{"max_tokens": 1}', {**JSON, "content-encoding": encoding})
    assert response.status_code == 200


def test_two_lengths_are_refused_and_end_the_connection(server: Running) -> None:
    """Whoever stands between may take what follows for another request."""
    with connect(server) as connection:
        connection.sendall(
            HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        )
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"\r\nconnection: close" in head.lower()
    assert b'"code":"ambiguous_length"' in body


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


@pytest.mark.parametrize("num_bytes", [LIMIT + 1, 99_999_999])
def test_a_client_that_waits_for_leave_gets_413_at_once(server: Running, num_bytes: int) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % num_bytes)
        reply = received(connection)
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in reply


def test_a_huge_declared_length_gets_413_at_once(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (LIMIT + DISCARD_BYTES + 1))
        reply = received(connection)
    assert reply.startswith(b"HTTP/1.1 413")  # not 408, after the time to receive
    assert b'"code":"body_too_large"' in reply
