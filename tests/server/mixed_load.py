"""Clients that load a server with requests of all kinds, and check each answer as far as that is cheap."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator

from tests.server.mixed_requests import KINDS, Ask, is_error

ANSWER_S = 120.0  # this is about answers that never come, not about slow ones: the machine may be busy
MAX_REQUESTS = 10**6  # of one load, whatever its time


class Load:
    """Clients that send one request after the other until they are told to stop.

    Attributes:
        counts: requests by kind and status; status 0 is a client that went away.
        failures: what should not have come, in words.
    """

    def __init__(self, url: str, num_clients: int, seed: int) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.failures: list[str] = []
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname and parts.port
        self._address = (parts.hostname, parts.port)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(random.Random(seed * 1000 + number),), daemon=True)
            for number in range(num_clients)
        ]

    @property
    def num_requests(self) -> int:
        with self._lock:
            return self.counts.total()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        deadline_s = time.monotonic() + ANSWER_S
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self._threads), "a client still waits for an answer"

    def _client(self, rng: random.Random) -> None:
        kinds, weights = [kind for kind, _ in KINDS], [weight for _, weight in KINDS]
        with contextlib.closing(http.client.HTTPConnection(*self._address, timeout=ANSWER_S)) as connection:
            while not self._stop.is_set() and self.num_requests < MAX_REQUESTS:
                ask = rng.choices(kinds, weights)[0](rng)
                status = self._try(connection, ask, rng)
                if status is None:
                    return
                with self._lock:
                    self.counts[ask.kind, status] += 1
                if rng.random() < 0.2:
                    connection.close()  # it is opened again by itself

    def _try(self, connection: http.client.HTTPConnection, ask: Ask, rng: random.Random) -> int | None:
        """Send a request; return its status, or None after a failure that has no status."""
        begun_s, num_before = time.monotonic(), self.num_requests
        try:
            if ask.patience_s is None:
                return self._exchange(connection, ask)
            self._leave(ask, ask.patience_s, rng)
            return 0
        except Exception as error:  # noqa: BLE001  # the thread of a test: told by whoever reads `failures`
            # A lost answer, or a machine that stood still? Then the others got none either.
            others = f"{self.num_requests - num_before} others were answered meanwhile"
            seconds = time.monotonic() - begun_s
            self._fail(f"{ask.kind}: {ask.path}: {error!r} after {seconds:.1f} s; {others}")
            return None

    def _exchange(self, connection: http.client.HTTPConnection, ask: Ask) -> int:
        headers = {**ask.headers, **({} if ask.body is None else {"Content-Type": "application/json"})}
        connection.request(ask.method, ask.path, ask.body, headers)
        response = connection.getresponse()
        content = response.read()
        expected = ask.whole if response.status == 200 else is_error
        if response.status not in ask.statuses or not expected(content):
            asked = (ask.body or b"")[:400]
            self._fail(f"{ask.kind}: {ask.path} {asked!r}: {response.status} {content[-400:]!r}")
        return response.status

    def _leave(self, ask: Ask, patience_s: float, rng: random.Random) -> None:
        assert ask.body is not None
        head = f"POST {ask.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sent = f"{head}Content-Length: {len(ask.body)}\r\n\r\n".encode() + ask.body
        with socket.create_connection(self._address, ANSWER_S) as connection:
            connection.sendall(sent[: rng.choice([len(sent), len(sent), len(sent) - 5, 20])])
            time.sleep(patience_s)
            if rng.random() < 0.5:  # with a reset in place of an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _fail(self, words: str) -> None:
        with self._lock:
            self.failures.append(words)


@contextlib.contextmanager
def loading(url: str, num_clients: int, seed: int) -> Iterator[Load]:
    """Load a server while the block runs."""
    load = Load(url, num_clients, seed)
    load.start()
    try:
        yield load
    finally:
        load.stop()
