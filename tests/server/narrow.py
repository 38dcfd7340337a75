"""A server with narrow limits, and connections to it that may send any bytes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.server.running import Running, serving

LIMIT = 4096


@contextlib.contextmanager
def serving_narrowly(model_path: Path) -> Iterator[Running]:
    """Serve with small bodies and a second to send them; a canary request must be answered alike at the end."""
    with serving(model_path, max_body_bytes=LIMIT, receive_timeout_s=1.0) as running:
        before = running.post(prompt="canary", max_tokens=4, seed=1).json()["outputs"]
        yield running
        assert running.post(prompt="canary", max_tokens=4, seed=1).json()["outputs"] == before
        assert running.engine.held_rows == 0


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # before connecting: else it grows
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


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
