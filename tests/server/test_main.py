"""`prime-serve` as a process: its one line, its signals and its exit status."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from prime_core.checkpoint import load_checkpoint
from prime_core.sample import sample
from server.main import main
from tests.server.running import wait_until

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(
    r"prime-serve: (http://127\.0\.0\.1:\d+) is ready; model tiny, 0\.0M parameters, (\w+) on cpu\n"
)


class Process:
    """A running `prime-serve`."""

    def __init__(self, model_path: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "server.main", "--model", str(model_path), "--port", "0", *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PRIME_")}
        self.popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.line = self.popen.stdout.readline()
        found = READY.fullmatch(self.line)
        assert found, (self.line, self.popen.communicate(timeout=10)[1])
        self.url = found[1]

    def post(self, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/generate", json=body, timeout=60)

    def end(self) -> int:
        try:
            self.popen.communicate(timeout=15)
        finally:
            self.popen.kill()
            self.popen.wait()
        return self.popen.returncode


@pytest.fixture
def process(model_path: Path) -> Iterator[Process]:
    running = Process(model_path, "--max-steps", "100000", "--num-threads", "1")
    yield running
    running.popen.kill()
    running.popen.communicate()


LONG = {"template": ["a", {"gap": 60}], "steps": 100_000, "n": 16}


def in_flight(process: Process) -> bool:
    metrics = httpx.get(f"{process.url}/metrics").text
    return "prime_num_requests_running 1.0" in metrics


def test_sigterm_drains_after_what_was_accepted(process: Process, model_path: Path) -> None:
    canary: dict[str, Any] = {"prompt": "canary", "max_tokens": 9, "seed": 3, "n": 2}
    before = process.post(**canary).json()["outputs"]
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(process.post, **LONG)
        wait_until(lambda: in_flight(process))
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
        assert httpx.get(f"{process.url}/ready").json() == {"status": "draining"}
        assert process.post(max_tokens=1).json()["error"]["code"] == "draining"
        assert httpx.get(f"{process.url}/health").status_code == 200
        assert len(reply.result().json()["outputs"]) == 16
    assert process.end() == 0
    # Another process, without a server, gives the same bytes.
    expected = sample(load_checkpoint(model_path), **canary)
    assert [row["text"] for row in before] == [item.text for item in expected]


def test_a_second_signal_ends_at_once(process: Process) -> None:
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(process.post, **LONG)
        wait_until(lambda: in_flight(process))
        process.popen.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(3) == 1
        with pytest.raises(httpx.RemoteProtocolError):
            reply.result()


CRASHING = """
import sys
from server import main
from server.engine import Engine

step = Engine.step
def crash_on_rows(engine):
    if engine._inbox:
        engine._inbox[0].rows[0].plan = None  # a broken hand-off, as a defect would make it
    return step(engine)
Engine.step = crash_on_rows
sys.exit(main.main())
"""


def test_a_dead_engine_ends_the_process_with_an_error(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CRASHING, "--model", str(model_path), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            assert popen.stdout is not None
            found = READY.fullmatch(popen.stdout.readline())
            assert found
            codes = [
                httpx.post(f"{found[1]}/generate", json={"max_tokens": 2}, timeout=20).json()["error"]["code"]
                for _ in range(3)
            ]
            assert codes == ["engine_error"] * 3
            _, log = popen.communicate(timeout=15)
            assert popen.returncode == 1
            assert "the engine has died" in log
        finally:
            popen.kill()


def test_a_port_in_use_is_said_in_one_line(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["--model", str(model_path), "--port", port]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"prime-serve: .*cannot listen on 127\.0\.0\.1 port {port}: .*\n", error)
