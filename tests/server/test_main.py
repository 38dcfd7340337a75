"""`prime-serve` as a process: its one line, its signals and its exit status."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.sample import sample
from server.engine.engine import Engine
from server.http.keys import KeyRing
from server.lifetime import Server, serve
from server.main import http_config, main
from server.reload import Reloader
from server.settings import Settings
from tests.server.running import make_engine, wait_until

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(
    r"prime-serve: (http://127\.0\.0\.1:\d+) is ready; model tiny, 0\.0M parameters, (\w+) on cpu\n"
)


# The engine makes no call while a file exists: what is in flight stays so for as long as a test needs.
HELD = """
import os, sys, time
from server import main
from server.engine.engine import Engine

hold = sys.argv.pop(1)
step = Engine.step
def wait_first(engine):
    while os.path.exists(hold):
        for queue in engine.queues.values():
            queue.admit()
            for entry in queue.choose().entries:
                entry.job.started_s = time.monotonic()
        time.sleep(0.01)
    return step(engine)
Engine.step = wait_first
sys.exit(main.main())
"""


class Process:
    """A running `prime-serve` that makes no denoiser call while the file `hold` exists."""

    def __init__(self, model_path: Path, hold: Path) -> None:
        self.hold = hold
        command = [sys.executable, "-c", HELD, str(hold), "--model", str(model_path), "--port", "0"]
        command += ["--max-steps", "100000", "--num-threads", "1"]
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
        assert found, (self.line, self.popen.communicate(timeout=60)[1])
        self.url = found[1]

    def post(self, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/generate", json=body, timeout=60)

    def end(self) -> int:
        try:
            self.popen.communicate(timeout=60)
        finally:
            self.popen.kill()
            self.popen.wait()
        return self.popen.returncode


@pytest.fixture
def process(model_path: Path, tmp_path: Path) -> Iterator[Process]:
    running = Process(model_path, tmp_path / "hold")
    yield running
    running.popen.kill()
    running.popen.communicate()


LONG = {"template": ["a", {"gap": 60}], "steps": 100_000, "n": 16}


def in_flight(process: Process) -> bool:
    metrics = httpx.get(f"{process.url}/metrics").text
    return 'prime_num_requests_running{model="tiny"} 1.0' in metrics


def test_sigterm_drains_after_what_was_accepted(process: Process, model_path: Path) -> None:
    canary: dict[str, Any] = {"prompt": "canary", "max_tokens": 9, "seed": 3, "n": 2}
    before = process.post(**canary).json()["outputs"]
    process.hold.touch()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(process.post, **LONG)
        wait_until(lambda: in_flight(process))
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
        assert httpx.get(f"{process.url}/ready").json() == {"status": "draining"}
        assert process.post(max_tokens=1).json()["error"]["code"] == "draining"
        assert httpx.get(f"{process.url}/health").status_code == 200
        process.hold.unlink()
        assert len(reply.result().json()["outputs"]) == 16
    assert process.end() == 0
    # Another process, without a server, gives the same bytes.
    expected = sample(load_checkpoint(model_path), **canary)
    assert [row["text"] for row in before] == [item.text for item in expected]


def test_a_second_signal_ends_at_once(process: Process) -> None:
    process.hold.touch()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(process.post, **LONG)
        wait_until(lambda: in_flight(process))
        process.popen.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(60) == 1
        with pytest.raises(httpx.RemoteProtocolError):
            reply.result()


CRASHING = """
import sys
from server import main
from server.engine.engine import Engine

step = Engine.step
def crash_on_rows(engine):
    inbox = engine.queues["tiny"].inbox
    if inbox:
        inbox[0].rows[0].plan = None  # a broken hand-off, as a defect would make it
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
                httpx.post(f"{found[1]}/generate", json={"max_tokens": 2}, timeout=60).json()["error"]["code"]
                for _ in range(3)
            ]
            assert codes == ["engine_error"] * 3
            _, log = popen.communicate(timeout=60)
            assert popen.returncode == 1
            assert "the engine has died" in log
        finally:
            popen.kill()


HUNG_UP_EARLY = """
import os, signal, sys
from server import main

def load_model(settings, name):
    os.kill(os.getpid(), signal.SIGHUP)
    raise ValueError("it read on")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a parent may have left it ignored
main.load_model = load_model
sys.exit(main.main())
"""


def test_a_hangup_while_models_are_read_for_the_first_time_does_nothing(model_path: Path) -> None:
    command = [sys.executable, "-c", HUNG_UP_EARLY, "--model", str(model_path), "--port", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (2, "prime-serve: it read on\n")


def test_a_stdout_that_nobody_reads_leaves_a_server_that_ends(model_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-m", "server.main", "--model", str(model_path), "--port", "0"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        os.close(writer)
        limit = threading.Timer(60, popen.kill)
        limit.start()
        try:
            assert popen.stderr is not None
            found = next(found for line in popen.stderr if (found := READY.search(line)))
            assert httpx.get(f"{found[1]}/ready").status_code == 200
            popen.send_signal(signal.SIGTERM)
            popen.communicate()
            assert popen.returncode == 0
        finally:
            limit.cancel()
            popen.kill()


def test_a_watcher_that_fails_ends_the_server(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(model=model_path)
    engine, _ = make_engine(settings)
    server = Server(http_config(engine, settings), engine, drain_timeout_s=1.0)
    # The watcher is the only one to ask; a defect there must not leave a server that no signal can end.
    monkeypatch.setattr(Engine, "alive", property(lambda self: 1 / 0))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert asyncio.run(asyncio.wait_for(serve(server, listener, "ready", Reloader(KeyRing())), 60)) == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_port_in_use_is_said_in_one_line(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["--model", str(model_path), "--port", port]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"prime-serve: .*cannot listen on 127\.0\.0\.1 port {port}: .*\n", error)
