"""Connections have a bound: those at rest make room, those at work are left alone, and probes are always answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.command_line import load_settings
from server.http.crowd import RefuseCrowds
from server.http.protocol import SEND_BUFFER_BYTES, DeadlineProtocol
from server.metrics import Metrics
from server.open_files import SPARE_FILES, allow_files
from server.settings import SettingsError
from tests.server.processes import Served
from tests.server.running import Gate, Running, assert_error, serving, wait_until

MOST = 4
BODY = b'{"max_tokens": 1}'
UNENDED = (
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    % (len(BODY), BODY[:-1])
)
PROBE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def server(model_path: Path) -> Iterator[Running]:
    with serving(model_path, max_connections=MOST) as running:
        running.client.close()  # what it keeps open would be counted
        yield running
        running.client = httpx.Client()


def connect(server: Running) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 0), 20)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def is_open(connection: socket.socket) -> bool:
    """Whether the server still answers on it."""
    connection.sendall(PROBE)
    answer = b""
    while not answer.endswith(b"}") and (part := connection.recv(65536)):
        answer += part
    return answer.startswith(b"HTTP/1.1 200")


def post(server: Running) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", json={"max_tokens": 3, "steps": 2}, timeout=60)


def closed(server: Running) -> float:
    value = server.engine.metrics.registry.get_sample_value("prime_http_connections_closed_total")
    assert value is not None
    return value


@contextlib.contextmanager
def connected(server: Running, number: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(number)]


def test_when_all_are_at_work_requests_are_refused_but_probes(server: Running) -> None:
    gate = server.denoiser.hook = Gate()
    with ThreadPoolExecutor(MOST) as pool:
        accepted = [pool.submit(post, server) for _ in range(MOST)]
        wait_until(lambda: server.engine.held_rows == MOST)
        for _ in range(3):
            refused = post(server)
            assert f"all {MOST} connections are at work" in assert_error(refused, 429, "server_busy")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
            for path in ("/health", "/ready"):
                assert httpx.get(f"{server.url}{path}").status_code == 200
        assert server.metric("prime_rejected_total", model="", reason="busy") == 3
        gate.opened.set()
        assert [each.result().status_code for each in accepted] == [200] * MOST
    assert post(server).status_code == 200
    assert server.engine.held_rows == 0


def test_requests_that_fail_leave_their_place() -> None:
    async def fail(*_: Any) -> None:
        raise ZeroDivisionError

    async def unused(*_: Any) -> Any:
        return None

    inside = RefuseCrowds(fail, 1, Metrics())
    scope = {"type": "http", "path": "/generate"}
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(inside(scope, unused, unused))


def test_who_has_not_said_anything_rests_since_it_came(server: Running) -> None:
    with connect(server) as first:
        assert is_open(first)
        with connected(server, MOST - 1) as (silent, *others), connect(server) as last:
            assert is_closed(first)
            assert all(is_open(each) for each in (silent, *others, last))


def test_those_that_rest_make_room_and_longest_first(server: Running) -> None:
    with connected(server, MOST) as (first, second, third, fourth):
        assert all(
            is_open(each) for each in (second, third, fourth, first)
        )  # from now on they rest, in this order
        third.sendall(PROBE[:-2])  # a head that does not end
        with connect(server) as fifth:
            assert is_closed(second)
            assert [is_open(each) for each in (fourth, fifth, first)] == [True] * 3
            with connect(server) as sixth:
                assert is_closed(third)
                assert [is_open(each) for each in (first, fourth, fifth, sixth)] == [True] * 4
        assert closed(server) == 2


def test_those_that_come_at_once_make_room_each_for_itself(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def render() -> bytes:
        entered.set()
        assert go_on.wait(20)
        return b""

    monkeypatch.setattr(server.engine.metrics, "render", render)
    with connected(server, MOST) as (first, second, third, last):
        assert all(is_open(each) for each in (first, second, third, last))
        last.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert entered.wait(20)  # the event loop stands still
        with connected(server, 3) as others:
            go_on.set()
            assert all(is_closed(each) for each in (first, second, third))
            assert all(is_open(each) for each in others)


def test_little_of_an_answer_waits_where_nobody_sees_it(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the kernel no more than was asked for, and of our own the first byte counts as waiting."""
    made = DeadlineProtocol.connection_made
    noted: list[tuple[int, tuple[int, int]]] = []

    def note(self: DeadlineProtocol, transport: Any) -> None:
        made(self, transport)
        size = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        noted.append((size, transport.get_write_buffer_limits()))

    monkeypatch.setattr(DeadlineProtocol, "connection_made", note)
    with connect(server) as connection:
        assert is_open(connection)
    ((size, limits),) = noted
    assert size in (SEND_BUFFER_BYTES, 2 * SEND_BUFFER_BYTES)  # Linux doubles it for its own records
    assert limits == (0, 0)


def test_those_at_work_are_left_alone(server: Running) -> None:
    gate = server.denoiser.hook = Gate()
    with ThreadPoolExecutor(MOST) as pool:
        accepted = [pool.submit(post, server) for _ in range(MOST - 1)]
        wait_until(lambda: server.engine.held_rows == MOST - 1)
        with connected(server, 10) as (*others, last):
            assert all(is_closed(each) for each in others)
            assert is_open(last)
            gate.opened.set()
        assert [each.result().status_code for each in accepted] == [200] * (MOST - 1)


def test_who_does_not_read_an_answer_makes_room_after_those_that_wait(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(server, MOST) as (unread, first, second, third):
        port = unread.getsockname()[1]
        monkeypatch.setattr(DeadlineProtocol, "has_unsent", property(lambda self: self.client[1] == port))
        assert all(is_open(each) for each in (unread, first, second, third))  # and it has rested longest
        with connected(server, 3) as others:
            assert all(is_closed(each) for each in (first, second, third))
            for each in others:
                each.sendall(UNENDED)
            wait_until(lambda: in_progress(server) == 3)
            with connect(server) as another:
                assert is_closed(unread)
                assert is_open(another)
                for each in others:
                    each.sendall(b"}")
                    assert each.recv(65536).startswith(b"HTTP/1.1 200")


def in_progress(server: Running) -> float:
    value = server.engine.metrics.registry.get_sample_value("prime_http_requests_in_progress")
    assert value is not None
    return value


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = (1024, 4096)
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, value: found.append(value))
    with caplog.at_level(logging.WARNING):
        assert allow_files(1024 - SPARE_FILES) == 1024 - SPARE_FILES
        assert not found
        assert allow_files(1024) == 1024
        assert found == [(1024 + SPARE_FILES, 4096)]
        limits = (1024, resource.RLIM_INFINITY)
        assert allow_files(10_000) == 10_000
        assert found[1:] == [(10_000 + SPARE_FILES, resource.RLIM_INFINITY)]
        limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        assert allow_files(10_000) == 10_000
        assert len(found) == 2
        assert not caplog.records
        limits = (1024, 4096)
        assert allow_files(4096) == 4096 - SPARE_FILES
    assert found[2:] == [(4096, 4096)]
    assert "at most 3584 connections, as this process may have 4096 files open: for 4096 raise" in caplog.text
    limits = (64, 64)
    assert allow_files(4096) == 1


def test_a_crowd_that_says_nothing_keeps_nobody_out(model_path: Path) -> None:
    """A process that began with a small limit of open files, and more connections than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_connections = 1500
    if soft < num_connections + 500:
        pytest.skip("this process may not open so many files itself")
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        served = Served("--model", str(model_path), "--max-connections", "200")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with served, contextlib.ExitStack() as stack:
        url = httpx.URL(served.url)
        for _ in range(num_connections):
            connection = stack.enter_context(socket.create_connection((url.host, url.port or 0), 20))
            connection.sendall(PROBE[:-2])
        assert served.get("/health").status_code == 200
        assert served.post(max_tokens=2, steps=2).status_code == 200
        assert "Too many open files" not in served.log
        assert len(list(Path(f"/proc/{served.popen.pid}/fd").iterdir())) < 200 + 200


def test_bounds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"--max-held-body-bytes .*at least max_body_bytes \(134217728\)"):
        load_settings(["--max-body-bytes", str(2**27)])
    with pytest.raises(SettingsError, match="--max-connections"):
        load_settings(["--max-connections", "0"])
