"""SIGTERM under load (fault 26): what was accepted is answered in full, the rest is refused, and the status is 0.

MDM_DRAINS=50 tries it so many times, each time after another while of load.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from tests.server.processes import Served
from tests.server.running import wait_until

NUM_DRAINS = int(os.environ.get("MDM_DRAINS", "1"))
NUM_CLIENTS = 8
# Text of two outputs, the same as a stream, and a score: one after the other, from every client.
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"max_tokens": 8, "steps": 4, "n": 2}),
    ("/generate", {"max_tokens": 8, "steps": 4, "n": 2, "stream": True}),
    ("/score", {"text": "abc", "num_samples": 2}),
]
LONG: dict[str, Any] = {"max_tokens": 60, "steps": 60, "stream": True}
LOGGED = re.compile(r"INFO prime\.access (\S+) POST \S+ (\d+) ")


@dataclass
class Asked:
    """A request and what became of it: an answer in full, a refusal in words, or nothing that could be read."""

    id: str
    begun_s: float
    ended_s: float = math.inf
    outcome: Literal["answered", "draining", "nothing"] = "nothing"


class Clients:
    """Clients that ask one thing after the other, until the server has gone.

    Attributes:
        asked: all requests.
        long_runs: a long one has its first frame.
    """

    def __init__(self, url: str) -> None:
        self.asked: list[Asked] = []
        self.long_runs = threading.Event()
        self._url = url
        self._lock = threading.Lock()

    def num(self, outcome: str) -> int:
        with self._lock:
            return sum(each.outcome == outcome for each in self.asked)

    def ask_on(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            asked, turn = None, number
            while asked is None or asked.outcome != "nothing":
                asked = self.ask(client, *BODIES[turn % len(BODIES)])
                turn += 1
                time.sleep(0.01)

    def ask_long(self) -> Asked:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            return self.ask(client, "/generate", LONG, self.long_runs)

    def ask(
        self, client: httpx.Client, path: str, body: dict[str, Any], begins: threading.Event | None = None
    ) -> Asked:
        """Send a request; ``begins`` is set when the first of its answer is there."""
        with self._lock:
            asked = Asked(f"ask-{len(self.asked)}", time.monotonic())
            self.asked.append(asked)
        content = ""
        try:
            with client.stream("POST", path, json=body, headers={"X-Request-Id": asked.id}) as reply:
                for piece in reply.iter_text():
                    content += piece
                    if begins is not None:
                        begins.set()
        except httpx.TransportError:  # cut off, or never heard: the log tells
            return asked
        if reply.status_code == 200:
            assert is_whole(content, body)
            asked.outcome = "answered"
        else:
            assert (reply.status_code, json.loads(content)["error"]["code"]) == (503, "draining")
            asked.outcome = "draining"
        asked.ended_s = time.monotonic()
        return asked


def is_whole(content: str, body: dict[str, Any]) -> bool:
    if body.get("stream"):
        *_, content, done = content.strip().split("\n\n")
        assert done == "data: [DONE]"
        content = content.removeprefix("data: ")
    answer = json.loads(content)
    num: int = body.get("n", 1)
    return len(answer["scores" if "text" in body else "outputs"]) == num


@pytest.mark.parametrize("attempt", range(NUM_DRAINS))
def test_fault_26_a_drain_under_load_loses_nothing(model_path: Path, attempt: int) -> None:
    slow: list[Any] = [{"fault": "slow", "calls": 10**6, "seconds": 0.01}]
    with (
        ThreadPoolExecutor(NUM_CLIENTS + 1) as pool,  # its clients end when the server does, however that is
        Served("--model", str(model_path), "--max-batch-rows", "4", faults=slow) as served,
    ):
        clients = Clients(served.url)
        asking = [pool.submit(clients.ask_on, number) for number in range(NUM_CLIENTS)]
        wait_until(lambda: clients.num("answered") > 8 + attempt)
        long = pool.submit(clients.ask_long)
        assert clients.long_runs.wait(60)
        signalled_s = time.monotonic()
        served.signal(signal.SIGTERM)
        assert long.result().outcome == "answered"
        for each in asking:
            each.result()
        assert served.wait() == 0
        with pytest.raises(httpx.ConnectError):
            served.get("/health")
        print(f"ready after {served.start_s:.2f} s, drained in {time.monotonic() - signalled_s:.2f} s")
        assert clients.num("draining") > 0
        assert_nothing_lost(clients.asked, signalled_s, dict(LOGGED.findall(served.log)))


def assert_nothing_lost(asked: list[Asked], signalled_s: float, statuses: dict[str, str]) -> None:
    """Compare what the clients saw with what the server says that it did."""
    first_refused_s = min(each.ended_s for each in asked if each.outcome == "draining")
    assert first_refused_s > signalled_s
    for each in asked:
        if each.outcome == "answered":
            assert each.begun_s < first_refused_s, each
            assert statuses[each.id] == "200", each
        elif each.outcome == "draining":
            assert statuses[each.id] == "503", each
        else:  # after the signal, to a door that was about to close: the server never read it
            assert each.begun_s > signalled_s, each
            assert each.id not in statuses, each
