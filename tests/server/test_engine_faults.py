"""What the engine does when things go wrong: faults stay with their callers, and rows come free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

import server.engine.engine as engine_module
from server.engine.failures import EngineError, UnavailableError
from server.settings import Settings
from tests.server.background import Background
from tests.server.few_rows import serving_few_rows
from tests.server.running import NAME, Gate, Running, assert_error, make_engine, serving, submit, wait_until


@pytest.fixture
def server(model_path: Path) -> Iterator[Running]:
    with serving_few_rows(model_path) as running:
        yield running


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
