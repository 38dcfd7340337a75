"""Clients that send or read too slowly: they are cut off, others are served meanwhile, and patience has its reward."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.narrow import HEAD, connect, received, serving_narrowly
from tests.server.running import Running


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving_narrowly(model_path) as running:
        yield running


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


def test_an_empty_line_alone_does_not_keep_a_connection(server: Running) -> None:
    started = time.monotonic()
    with connect(server) as connection:
        connection.sendall(b"\r\n")
        assert received(connection) == b""
    assert time.monotonic() - started < 10
