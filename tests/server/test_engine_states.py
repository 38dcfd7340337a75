"""The states of the engine: warming up, ready, stalled, draining or stopped, and the server tells which."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import server.engine.engine as engine_module
import server.engine.stopwatch as stopwatch
from server.engine.failures import EngineError, UnavailableError
from server.engine.warm_up import WARM_UP_TOKENS
from server.settings import Settings
from tests.server.background import Background
from tests.server.few_rows import serving_few_rows
from tests.server.running import NAME, Gate, Running, assert_error, make_engine, serving, submit, wait_until


@pytest.fixture
def server(model_path: Path) -> Iterator[Running]:
    with serving_few_rows(model_path) as running:
        yield running


def test_a_hanging_call_is_not_ready(
    server: Running, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "MIN_STALL_S", 0.2)
    monkeypatch.setattr(stopwatch, "STALL_FACTOR", 0.0)
    gate = server.denoiser.hook = Gate()
    reply = background.post(max_tokens=3)
    assert gate.entered.wait(60)
    wait_until(lambda: server.client.get("/ready").status_code == 503)
    assert server.client.get("/ready").json() == {"status": "stalled"}
    assert server.client.get("/health").status_code == 200
    gate.opened.set()
    assert reply.result().status_code == 200
    assert server.client.get("/ready").json() == {"status": "ready"}


def test_a_call_over_many_tokens_may_take_longer_than_small_ones_did() -> None:
    watch = stopwatch.CallStopwatch()
    for size in (16, 48) * 10:
        begun_s = time.monotonic()
        time.sleep(0.002 if size == 16 else 0.001)  # larger ones were no slower: no slope to go by
        watch.ended(begun_s, size)
    assert watch.limit_s == stopwatch.MIN_STALL_S
    with watch.call(16_384):
        per_token_s = watch.seconds_per_call / 32
        assert watch.limit_s == pytest.approx(stopwatch.STALL_FACTOR * 16_384 * per_token_s, rel=0.1)
        assert watch.limit_s > 5 and not watch.stalled


def test_a_warm_up_that_hangs_is_a_hang(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(Settings(model=model_path))
    denoiser: Any = engine.queues[NAME].checkpoint.denoiser
    gate = denoiser.hook = Gate()
    assert not engine.stalled
    engine.start()
    assert gate.entered.wait(60)
    assert (engine.state, engine.stalled) == ("warming up", False)
    monkeypatch.setattr(engine_module, "WARM_UP_LIMIT_S", 0.0)
    assert (engine.state, engine.stalled) == ("warming up", True)
    gate.opened.set()
    wait_until(lambda: engine.state == "ready")
    engine.stop()


def test_a_hang_outside_of_calls_is_not_ready(
    server: Running, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "MIN_STALL_S", 0.2)
    monkeypatch.setattr(stopwatch, "STALL_FACTOR", 0.0)
    queue, gate = server.engine.queues[NAME], Gate()
    hand_out = queue.hand_out

    def hang(*arguments: Any) -> None:
        gate([])
        hand_out(*arguments)

    monkeypatch.setattr(queue, "hand_out", hang)
    reply = background.post(max_tokens=3)
    assert gate.entered.wait(60)
    wait_until(lambda: server.client.get("/ready").json() == {"status": "stalled"})
    gate.opened.set()
    assert reply.result().status_code == 200
    wait_until(lambda: server.client.get("/ready").json() == {"status": "ready"})


def test_drain_refuses_the_new_and_finishes_the_old(model_path: Path) -> None:
    with serving(model_path) as running:
        gate = running.denoiser.hook = Gate()
        background = Background(running)
        reply = background.post(max_tokens=6)
        assert gate.entered.wait(60)
        running.engine.drain()
        assert running.client.get("/ready").json() == {"status": "draining"}
        refused = running.post(max_tokens=6)
        assert_error(refused, 503, "draining")
        assert refused.headers["retry-after"] == "1"
        gate.opened.set()
        assert reply.result().status_code == 200
        background.pool.shutdown()


def test_a_hang_of_the_engines_own_request_is_not_ready(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, denoiser = make_engine(Settings(model=model_path))
    engine.start()
    wait_until(lambda: engine.state == "ready")
    monkeypatch.setattr(stopwatch, "MIN_STALL_S", 0.2)
    monkeypatch.setattr(stopwatch, "STALL_FACTOR", 0.0)
    gate = Gate()
    calls: list[list[int]] = []

    def fail_then_hang(lengths: Sequence[int]) -> None:
        calls.append(list(lengths))
        if len(calls) <= engine_module.MAX_FAULTS:
            raise RuntimeError("a fault of the device")
        gate(lengths)

    denoiser.hook = fail_then_hang
    for _ in range(engine_module.MAX_FAULTS):
        with pytest.raises(EngineError):
            submit(engine, 4).done.result(60)
    assert gate.entered.wait(60)  # in the engine's own request
    wait_until(lambda: engine.state == "stalled")
    gate.opened.set()
    wait_until(lambda: engine.state == "ready")
    engine.stop()


def test_stop_fails_who_still_waits(model_path: Path) -> None:
    engine, denoiser = make_engine(Settings(model=model_path))
    engine.start()
    wait_until(lambda: engine.state == "ready")
    gate = denoiser.hook = Gate()
    job = submit(engine, 4)
    assert gate.entered.wait(60)
    engine.stop(timeout_s=0)
    gate.opened.set()
    with pytest.raises(UnavailableError):
        job.done.result(60)
    assert engine.held_rows == 0


def test_not_ready_before_the_first_real_call(model_path: Path) -> None:
    engine, denoiser = make_engine(Settings(model=model_path))
    gate = denoiser.hook = Gate()
    assert engine.state == "warming up"
    engine.start()
    assert gate.entered.wait(60)
    assert engine.state == "warming up"
    gate.opened.set()
    wait_until(lambda: engine.state == "ready")
    engine.stop()


def test_a_model_that_cannot_warm_up_stops_the_engine_with_one_line(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, denoiser = make_engine(Settings(model=model_path))
    denoiser.broken_length = WARM_UP_TOKENS
    engine.start()
    wait_until(lambda: not engine.alive)
    assert engine.state == "stopped"
    engine.stop()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is None
    assert record.getMessage() == (
        "cannot start: model 'tiny' gives logits that are not finite, so its weights are not sound: leave it out, or "
        "load another checkpoint of it"
    )
