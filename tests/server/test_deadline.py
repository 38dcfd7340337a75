"""Deadlines: in the queue, in a call, in a hang, in a stream, whatever the clock on the wall does (faults 25, 27)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

import server.engine.stopwatch as stopwatch
from server.engine.failures import DeadlineError
from server.http.deadline import HEADER
from server.settings import Settings
from tests.server.background import Background
from tests.server.running import NAME, Gate, Running, assert_error, make_engine, serving, submit, wait_until

CANARY = {"prompt": "canary", "max_tokens": 5, "steps": 4, "seed": 9}


@pytest.fixture
def server(model_path: Path) -> Iterator[Running]:
    with serving(model_path, max_batch_rows=1) as running:
        before = running.post(**CANARY).json()["outputs"]
        yield running
        running.denoiser.hook = None
        wait_until(lambda: running.engine.held_rows == 0)
        assert running.post(**CANARY).json()["outputs"] == before
        assert running.client.get("/health").status_code == 200


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse nothing at once: requests are to be late on their way."""
    monkeypatch.setattr(stopwatch, "MIN_CALLS", 10**9)


def post(server: Running, timeout_s: str, **body: object) -> httpx.Response:
    return server.client.post("/generate", json=body, headers={HEADER: timeout_s})


def failures(server: Running) -> float:
    return server.metric("prime_request_failure_total", reason="deadline")


def test_fault_25_who_is_late_in_the_queue_never_runs(server: Running, background: Background) -> None:
    gate = server.denoiser.hook = Gate()
    running = background.post(max_tokens=3, steps=2)
    assert gate.entered.wait(60)
    started = time.monotonic()
    assert_error(post(server, "0.3", max_tokens=7, steps=2), 504, "deadline_exceeded")
    assert 0.3 <= time.monotonic() - started < 10
    gate.opened.set()
    assert running.result().status_code == 200
    assert [7] not in server.denoiser.lengths
    assert failures(server) == 1
    assert server.engine.held_rows == 0


@pytest.mark.usefixtures("no_estimate")
def test_who_is_late_while_it_runs_frees_its_rows_within_a_step(server: Running) -> None:
    server.denoiser.hook = lambda lengths: time.sleep(0.02)
    assert_error(post(server, "0.3", max_tokens=64, steps="exact"), 504, "deadline_exceeded")
    wait_until(lambda: server.engine.held_rows == 0)
    calls = len(server.denoiser.lengths)
    time.sleep(0.1)
    assert len(server.denoiser.lengths) == calls < 64


def test_the_engine_itself_gives_up_what_is_late(model_path: Path) -> None:
    engine, denoiser = make_engine(Settings(model=model_path))
    engine.start()
    wait_until(lambda: engine.state == "ready")
    gate = denoiser.hook = Gate()
    first = submit(engine, 4)
    assert gate.entered.wait(60)
    late = submit(engine, 7, deadline_s=time.monotonic())
    gate.opened.set()
    with pytest.raises(DeadlineError):
        late.done.result(60)
    first.done.result(60)
    assert not any(7 in lengths for lengths in denoiser.lengths)
    assert engine.held_rows == 0
    engine.stop()


@pytest.mark.usefixtures("no_estimate")
def test_a_stream_that_is_late_ends_with_an_error(server: Running) -> None:
    server.denoiser.hook = lambda lengths: time.sleep(0.02)
    body = {"max_tokens": 64, "steps": "exact", "stream": True}
    text = post(server, "0.4", **body).text
    assert text.startswith("event: denoise\n")
    assert text.endswith("data: [DONE]\n\n")
    assert "event: error\n" in text
    assert '"code":"deadline_exceeded"' in text
    assert failures(server) == 1
    gate = server.denoiser.hook = Gate()  # a hang gives no news, and the stream ends all the same
    assert '"code":"deadline_exceeded"' in post(server, "0.3", **body).text
    gate.opened.set()


def test_the_limit_of_the_server_is_the_default(model_path: Path) -> None:
    with serving(model_path, max_request_s=0.3) as server:
        gate = server.denoiser.hook = Gate()
        assert_error(server.post(max_tokens=3), 504, "deadline_exceeded")
        gate.opened.set()
        message = assert_error(post(server, "0.4", max_tokens=3), 422, "invalid_header", HEADER)
        assert "at most 0.3" in message


@pytest.mark.parametrize(
    "value", ["0", "-1", "nan", "inf", "1e3", "1s", "", "601", "9" * 9, "0" * 21, "1,2", "１"]
)
def test_what_is_no_time_is_refused(server: Running, value: str) -> None:
    response = server.client.post(
        "/generate", json={"max_tokens": 1}, headers=[(HEADER.encode(), value.encode())]
    )
    assert_error(response, 422, "invalid_header", HEADER)
    assert server.engine.held_rows == 0


def test_two_times_are_none(server: Running) -> None:
    twice = [(HEADER, "60"), (HEADER, "60")]
    response = server.client.post("/generate", json={"max_tokens": 1}, headers=twice)
    assert_error(response, 422, "invalid_header", HEADER)


@pytest.mark.parametrize("value", ["60", "060.0", "000000012.50000000", "0.5000000001"])
def test_zeros_that_change_nothing_are_no_harm(server: Running, value: str) -> None:
    assert post(server, value, max_tokens=1).status_code == 200


def test_what_cannot_be_done_in_time_is_refused_at_once(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "MIN_CALLS", 3)
    assert post(server, "600", max_tokens=60, steps="exact").status_code == 200
    server.engine.queues[NAME].stopwatch.fastest_s = 0.01
    calls = len(server.denoiser.lengths)
    message = assert_error(post(server, "1", max_tokens=64, steps="exact"), 504, "deadline_unreachable")
    assert "128 denoiser calls" in message  # of 64 tokens of two digits, one at a time
    assert len(server.denoiser.lengths) == calls
    assert server.engine.held_rows == 0
    assert server.metric("prime_rejected_total", reason="deadline") == 1
    assert post(server, "10", max_tokens=64, steps="exact").status_code == 200


def test_the_first_slow_calls_are_no_measure() -> None:
    watch = stopwatch.CallStopwatch()
    for _ in range(stopwatch.MIN_CALLS - 1):
        watch.ended(time.monotonic(), 10)
    assert watch.fastest_s == 0
    watch.ended(time.monotonic(), 10)
    assert 0 < watch.fastest_s <= watch.last_s


@pytest.mark.usefixtures("no_estimate")
@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
def test_fault_27_a_clock_that_moves_by_a_day_moves_no_deadline(
    server: Running, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    now = time.time
    calls: list[Sequence[int]] = []

    def move_the_clock(lengths: Sequence[int]) -> None:
        calls.append(lengths)
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)
        time.sleep(0.01)

    server.denoiser.hook = move_the_clock
    body = post(server, "30", max_tokens=20, steps=20).json()
    assert body["timings"]["total_s"] < 30
    assert_error(post(server, "0.3", max_tokens=64, steps="exact"), 504, "deadline_exceeded")
    assert server.engine.state == "ready"
    assert time.time() - now() == pytest.approx(jump_s, abs=60)
