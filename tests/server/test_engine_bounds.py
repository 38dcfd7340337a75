"""The bounds of the queue: what does not fit is refused at once, with an honest time to come back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest

from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.prepare import prepare_rows
from server.engine.batcher import Job
from server.engine.call_cost import CallCost
from server.engine.engine import Engine
from server.engine.failures import QueueFullError
from server.engine.model_queue import LoadedModel
from server.engine.room import Room
from server.http.errors import ApiError
from server.refusals import submit
from server.settings import Settings
from tests.server.background import Background
from tests.server.few_rows import serving_few_rows
from tests.server.running import (
    CONTEXT,
    NAME,
    Gate,
    Running,
    assert_error,
    make_engine,
    serving,
    wait_until,
)


@pytest.fixture
def server(model_path: Path) -> Iterator[Running]:
    with serving_few_rows(model_path) as running:
        yield running


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
        assert server.engine._room.fill(2**20)  # all was given back
        background.pool.shutdown()


@pytest.mark.parametrize(("spare_bytes", "status"), [(-1, 422), (0, None), (1, None)])
def test_plans_may_take_all_of_the_memory(model_path: Path, spare_bytes: int, status: int | None) -> None:
    checkpoint = load_checkpoint(model_path)
    rows = list(prepare_rows(checkpoint, n=2, max_tokens=4, seed=0).rows)
    limit = sum(row.num_bytes for row in rows) + spare_bytes
    caps = {"max_batch_rows": 4, "max_batch_tokens": CONTEXT, "max_queue_rows": 4, "max_queue_bytes": limit}
    engine = Engine([LoadedModel(NAME, checkpoint)], **caps)
    engine.reserve(NAME, 4)
    with pytest.raises(ApiError) if status else nullcontext() as caught:
        submit(engine, Job(NAME, rows, 0.0), 60.0)
    if caught is not None:
        assert caught.value.status == status
        return
    with pytest.raises(ApiError) as full:  # now there is less than a plan's memory left
        submit(engine, Job(NAME, rows, 0.0), 60.0)
    assert (full.value.status, full.value.code) == (429, "queue_full")


def test_nobody_is_told_to_come_back_later_than_all_in_front_are_answered(model_path: Path) -> None:
    """Rows that have room and are not submitted yet are priced by those before them, and have no deadline yet."""
    limits: dict[str, Any] = {"max_batch_rows": 4, "max_queue_rows": 4, "max_n": 4, "max_request_s": 6.5}
    with serving(model_path, **limits) as server:
        queue = server.engine.queues[NAME]
        assert server.post(max_tokens=4, steps=4).status_code == 200
        queue.stopwatch.cost = CallCost(100.0, 0.0)
        server.engine.reserve(NAME, 4)
        refused = server.post(max_tokens=4)
        assert_error(refused, 429, "queue_full")
        assert refused.headers["retry-after"] == "7" and "try again in 7 s" in refused.text
        server.engine.release(NAME, 4)


def test_a_queue_has_room_for_a_row_at_least() -> None:
    with pytest.raises(ValueError, match="max_queue_rows must be at least 1, got 0"):
        Room(0, 2**20)


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
