"""What the engine does when things go wrong: faults stay with their callers, and rows come free."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import server.engine.engine as engine_module
import server.engine.stopwatch as stopwatch
from prime_core.sampling.prepare import prepare_rows
from server.engine.batcher import Job
from server.engine.call_cost import CallCost
from server.engine.failures import EngineError, QueueFullError, UnavailableError
from server.engine.warm_up import WARM_UP_TOKENS
from server.settings import Settings
from tests.server.running import NAME, Gate, Running, assert_error, make_engine, serving, submit, wait_until


@pytest.fixture
def server(model_path: Path) -> Iterator[Running]:
    """A server that must answer a canary request in the same way at the end."""
    with serving(model_path, max_queue_rows=8, max_batch_rows=4, max_n=8) as running:
        canary: dict[str, Any] = {"prompt": "canary", "max_tokens": 5, "steps": 4, "seed": 9}
        before = running.post(**canary).json()["outputs"]
        threads = threading.active_count()
        yield running
        running.denoiser.hook = running.denoiser.broken_length = None
        wait_until(lambda: running.engine.held_rows == 0)
        assert running.post(**canary).json()["outputs"] == before
        assert running.engine.state == "ready"
        # The pool that prepares rows may have grown to its bound.
        assert threading.active_count() <= threads + 2


class Background:
    """Requests in threads of their own."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.pool = ThreadPoolExecutor(16)

    def post(self, **body: object) -> Future[httpx.Response]:
        return self.pool.submit(lambda: httpx.post(f"{self.server.url}/generate", json=body, timeout=60))


@pytest.fixture
def background(server: Running) -> Iterator[Background]:
    made = Background(server)
    yield made
    made.pool.shutdown()


def test_a_denoiser_that_raises_fails_the_callers_of_that_call_only(
    server: Running, background: Background
) -> None:
    gate, after = Gate(), Gate()
    calls: list[list[int]] = []

    def fail_on_third(lengths: Sequence[int]) -> None:
        calls.append(list(lengths))
        if len(calls) == 1:
            gate(lengths)
        if len(calls) == 4:
            after(lengths)
        if len(calls) == 3:
            raise RuntimeError("a fault at step 3")

    server.denoiser.hook = fail_on_third
    first = background.post(max_tokens=20, steps="exact")
    assert gate.entered.wait(60)
    others = []
    for num_rows in (2, 3, 4):
        others.append(background.post(max_tokens=20, steps="exact"))
        wait_until(lambda held=num_rows: server.engine.held_rows == held)  # type: ignore[misc]
    others.append(background.post(max_tokens=10, steps=8, n=2))
    wait_until(lambda: server.engine.held_rows == 6)
    gate.opened.set()
    # The call holds four rows: one of each of four requests; the fifth request waits and is not touched.
    for reply in (first, *others[:3]):
        assert_error(reply.result(), 500, "engine_error")  # at once: the next call is held
    assert after.entered.wait(60)
    after.opened.set()
    assert others[3].result().status_code == 200
    assert server.metric("prime_request_failure_total", reason="engine_error") == 4


def test_a_row_that_is_not_finite_fails_alone(server: Running, background: Background) -> None:
    good: dict[str, Any] = {"max_tokens": 12, "steps": 8, "seed": 4}
    expected = server.post(**good).json()["outputs"]
    server.denoiser.broken_length = 7
    gate = server.denoiser.hook = Gate()
    replies = [background.post(**good), background.post(max_tokens=7, n=2, steps=30), background.post(**good)]
    assert gate.entered.wait(60)
    gate.opened.set()
    assert_error(replies[1].result(), 500, "non_finite")
    assert replies[0].result().json()["outputs"] == expected
    assert replies[2].result().json()["outputs"] == expected
    assert server.metric("prime_request_failure_total", reason="non_finite") == 1


def test_a_full_queue_refuses_with_an_honest_retry_after(server: Running, background: Background) -> None:
    gate = server.denoiser.hook = Gate()
    accepted = [background.post(max_tokens=8, steps=4, n=4) for _ in range(2)]
    wait_until(lambda: server.engine.held_rows == 8)
    for num_rows in (1, 8):
        response = server.post(n=num_rows)
        message = assert_error(response, 429, "queue_full")
        assert "8 rows" in message
        assert 1 <= int(response.headers["retry-after"]) <= 3600
    assert server.metric("prime_rejected_total", reason="queue_full") == 2
    gate.opened.set()
    assert [reply.result().status_code for reply in accepted] == [200, 200]
    assert server.post(n=8, max_tokens=4).status_code == 200


def test_the_memory_of_plans_is_bounded(model_path: Path) -> None:
    settings: Any = {"max_queue_bytes": 2**20, "max_n": 200, "max_work": 2**40}
    with serving(model_path, **settings) as server:
        background = Background(server)
        body: dict[str, Any] = {"max_tokens": 60, "steps": "exact", "seed": 1}
        rows = prepare_rows(server.engine.queues[NAME].checkpoint, n=1, **body).rows
        fitting = 2**20 // rows[0].num_bytes
        assert 5000 < rows[0].num_bytes and 2 <= fitting < 200
        assert sum(part.nbytes for part in rows[0].draws if part is not None) < rows[0].num_bytes
        message = assert_error(server.post(n=fitting + 1, **body), 422, "request_too_large")
        assert str(2**20) in message
        gate = server.denoiser.hook = Gate()
        first = background.post(n=fitting, **body)
        assert gate.entered.wait(60)
        refused = server.post(n=fitting, **body)
        assert_error(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.engine.held_rows == fitting
        gate.opened.set()
        assert first.result().status_code == 200
        server.denoiser.hook = None
        assert server.post(n=fitting, **body).status_code == 200  # all was given back
        background.pool.shutdown()


@pytest.mark.parametrize("admitted", [True, False])
def test_retry_after_grows_with_the_queue(model_path: Path, admitted: bool) -> None:
    settings = Settings(model=model_path, max_batch_rows=2, max_queue_rows=4, max_n=4)
    engine, _ = make_engine(settings)
    queue = engine.queues[NAME]
    queue.stopwatch.cost = CallCost(0.3, 0.01)
    prepared = prepare_rows(queue.checkpoint, n=4, steps="exact", max_tokens=10, seed=0)
    engine.reserve(NAME, 4)
    engine.submit(Job(NAME, list(prepared.rows), 0.0))
    if admitted:  # or still in the inbox, while a call runs
        queue.admit()
    for num_rows in (1, 4):  # a request gives its rows back together
        with pytest.raises(QueueFullError) as caught:
            engine.reserve(NAME, num_rows)
        assert caught.value.retry_after_s == 40 * (0.3 + 2 * 10 * 0.01)


def test_many_requests_at_once_are_accepted_or_refused(server: Running) -> None:
    async def flood() -> list[int]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            body = {"max_tokens": 2, "steps": 2}
            replies = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(80)))
        return [reply.status_code for reply in replies]

    before = server.metric("prime_request_success_total", finished_reason="length")
    before += server.metric("prime_request_success_total", finished_reason="stop")
    statuses = asyncio.run(flood())
    assert statuses.count(200) + statuses.count(429) == 80
    assert statuses.count(200) >= 8
    after = server.metric("prime_request_success_total", finished_reason="length")
    after += server.metric("prime_request_success_total", finished_reason="stop")
    assert after - before == statuses.count(200)
    assert server.metric("prime_rejected_total", reason="queue_full") == statuses.count(429)


def test_clients_that_leave_free_their_rows(server: Running) -> None:
    gate = server.denoiser.hook = Gate()

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            tasks = [
                asyncio.create_task(
                    client.post("/generate", json={"max_tokens": 30, "steps": "exact", "n": 4})
                )
                for _ in range(2)  # the first is in the call, the second waits
            ]
            while server.engine.held_rows != 8 or not gate.entered.is_set():
                await asyncio.sleep(0.005)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave())
    calls = len(server.denoiser.lengths)
    wait_until(lambda: server.metric("prime_request_failure_total", reason="cancelled") == 2)
    gate.opened.set()
    wait_until(lambda: server.engine.held_rows == 0)
    assert len(server.denoiser.lengths) == calls  # not one call more
    assert server.post(n=8, max_tokens=2).status_code == 200


def test_a_client_that_leaves_alone_disturbs_no_batch_mate(server: Running, background: Background) -> None:
    good: dict[str, Any] = {"max_tokens": 25, "steps": 30, "seed": 4}
    expected = server.post(**good).json()["outputs"]
    gate = server.denoiser.hook = Gate()
    reply = background.post(**good)
    assert gate.entered.wait(60)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json={"max_tokens": 9}, timeout=httpx.Timeout(60, read=0.3))
    gate.opened.set()
    assert reply.result().json()["outputs"] == expected


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
        with watch.call(size):
            time.sleep(0.002 if size == 16 else 0.001)  # larger ones were no slower: no slope to go by
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


class Collapse(BaseException):
    """What no handler of ordinary errors may catch."""


def test_a_dead_thread_is_noticed_and_fails_its_callers(model_path: Path) -> None:
    def collapse(lengths: Sequence[int]) -> None:
        raise Collapse

    excepthook, threading.excepthook = threading.excepthook, lambda args: None
    try:
        with serving(model_path) as running:
            running.denoiser.hook = collapse
            assert_error(running.post(max_tokens=6), 503, "unavailable")
            wait_until(lambda: not running.engine.alive)
            assert running.client.get("/ready").status_code == 503
            assert running.client.get("/ready").json() == {"status": "stopped"}
            assert_error(running.post(max_tokens=6), 503, "unavailable")
            assert running.client.get("/health").status_code == 200
    finally:
        threading.excepthook = excepthook


def test_crashes_of_the_loop_fail_the_callers_and_end_the_engine_when_repeated(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make_engine(Settings(model=model_path))
    engine.start()
    wait_until(lambda: engine.state == "ready")
    batcher = engine.queues[NAME].batcher
    choose = batcher.choose
    for _ in range(engine_module.MAX_CRASHES - 1):
        monkeypatch.setattr(batcher, "choose", lambda: 1 / 0)
        with pytest.raises(EngineError):
            submit(engine, 4).done.result(60)
        assert engine.alive
    monkeypatch.setattr(batcher, "choose", choose)
    submit(engine, 4).done.result(60)  # a success in between starts the count again
    monkeypatch.setattr(batcher, "choose", lambda: 1 / 0)
    for _ in range(engine_module.MAX_CRASHES):
        assert engine.held_rows == 0
        with pytest.raises(EngineError):
            submit(engine, 4).done.result(60)
    wait_until(lambda: not engine.alive)
    assert engine.state == "stopped"
    with pytest.raises(UnavailableError):
        submit(engine, 4)


def test_a_denoiser_that_always_raises_ends_the_engine(model_path: Path) -> None:
    engine, denoiser = make_engine(Settings(model=model_path))
    engine.start()
    wait_until(lambda: engine.state == "ready")

    def raise_on_small_rows(lengths: Sequence[int]) -> None:
        if 4 in lengths:
            raise RuntimeError("a fault of the request")

    denoiser.hook = raise_on_small_rows
    for _ in range(2 * engine_module.MAX_FAULTS):
        with pytest.raises(EngineError):
            submit(engine, 4).done.result(60)
    submit(engine, 5).done.result(60)  # the engine's own request works, so it goes on

    def always_raise(lengths: Sequence[int]) -> None:
        raise RuntimeError("a fault of the device")

    denoiser.hook = always_raise
    for _ in range(engine_module.MAX_FAULTS):
        with pytest.raises(EngineError):
            submit(engine, 4).done.result(60)
    wait_until(lambda: not engine.alive)
    assert engine.state == "stopped"


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
