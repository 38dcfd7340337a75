"""Large bodies, and many of them, through real sockets: nobody waits for them, and they take only their room."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from starlette.types import Message

import server.http.body as body_module
from server.http.body import DISCARD_BYTES, Bodies
from server.http.errors import ApiError
from server.metrics import Metrics
from tests.server.running import Running, assert_error, serving, wait_until

JSON = {"content-type": "application/json"}


def post(server: Running, content: bytes) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", content=content, headers=JSON, timeout=60)


def padded(num_bytes: int) -> bytes:
    return json.dumps({"max_tokens": 3, "steps": 2, "seed": 1}).encode().ljust(num_bytes)


def test_nobody_waits_while_a_large_body_is_parsed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go, parse = threading.Event(), threading.Event(), body_module.parse_json

    def held_parse(body: bytearray) -> object:
        if len(body) > 2**16:
            entered.set()
            assert go.wait(20)
        return parse(body)

    monkeypatch.setattr(body_module, "parse_json", held_parse)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(post, server, padded(2**16 + 1))
        try:
            assert entered.wait(20)
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
            small = post(server, padded(2**16))
        finally:
            go.set()
        assert small.json()["outputs"] == large.result().json()["outputs"]


def half_sent(server: Running, num_bytes: int, sent: int) -> socket.socket:
    """A connection with a part of a body on its way."""
    url = httpx.URL(server.url)
    connection = socket.create_connection((url.host, url.port or 0), 20)
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    connection.sendall(f"{head}{num_bytes}\r\n\r\n".encode() + padded(num_bytes)[:sent])
    return connection


def status_of(connection: socket.socket, rest: bytes) -> bytes:
    connection.sendall(rest)
    return connection.recv(65536).split()[1]


@pytest.fixture
def held_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """What the server started in the test holds of large bodies."""
    made: list[Bodies] = []
    build = Bodies.__init__

    def note(self: Bodies, *arguments: Any) -> None:
        build(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Bodies, "__init__", note)
    yield lambda: made[-1].held_bytes
    assert made[-1].held_bytes == 0


def test_large_bodies_together_have_a_bound_and_small_ones_pass_by(
    model_path: Path, held_bytes: Callable[[], int]
) -> None:
    size = 200_000
    with serving(model_path, max_body_bytes=size, max_held_body_bytes=300_000) as server:
        with half_sent(server, size, size - 5) as first, half_sent(server, size, size - 5) as second:
            wait_until(lambda: held_bytes() == 2 * (size - 5 - 2**16))
            refused = post(server, padded(size))
            assert "try again in 1 s" in assert_error(refused, 429, "server_busy")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
            assert server.metric("prime_rejected_total", model="", reason="busy") == 1
            assert server.metric("prime_rejected_total", model="", reason="invalid") == 0
            assert post(server, padded(2**16)).status_code == 200
            for path in ("/health", "/ready", "/info"):
                assert server.client.get(path).status_code == 200
            assert status_of(first, b"     ") == b"200"
            assert held_bytes() == size - 5 - 2**16
            assert post(server, padded(size)).status_code == 200
            second.close()
        wait_until(lambda: held_bytes() == 0)
        with pytest.raises(httpx.HTTPError):  # a body in chunks that stops in the middle
            httpx.post(f"{server.url}/generate", content=broken_off(size), headers=JSON, timeout=20)
        wait_until(lambda: held_bytes() == 0)
        assert_error(post(server, padded(size + 1)), 413, "body_too_large")
        assert_error(post(server, b"[" * size), 400, "invalid_json")


def broken_off(num_bytes: int) -> Iterator[bytes]:
    yield padded(num_bytes)[:-5]
    raise httpx.WriteError("the client breaks off")


def test_what_is_too_large_gives_its_room_back_and_is_read_no_longer_than_it_is_worth() -> None:
    megabyte = 2**20
    bodies = Bodies(3 * megabyte, 10 * megabyte, 60.0, Metrics())
    held: list[int] = []

    async def receive() -> Message:
        held.append(bodies.held_bytes)
        return {"type": "http.request", "body": bytes(megabyte), "more_body": len(held) < 100}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(ApiError) as caught:
        asyncio.run(bodies.read_json(Request(scope, receive)))
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")
    first_mb, *rest = [number * megabyte - 2**16 for number in (1, 2, 3)]
    num_thrown_away = DISCARD_BYTES // megabyte
    assert held == [0, first_mb, *rest, *[0] * num_thrown_away]


def test_what_is_wrong_in_a_large_body_is_told(server: Running) -> None:
    assert_error(post(server, b"[" * 2**17), 400, "invalid_json")
    assert_error(post(server, b'{"n": 1, "n": 2}'.ljust(2**17)), 422, "duplicate_key")
    assert_error(post(server, b'{"prompt": "' + b"a" * 2**17 + b'"}'), 422, "invalid_value", "prompt")
