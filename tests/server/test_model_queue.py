"""What the engine holds for a model: forecasts that follow the queue, faults that are counted, room that is kept."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import server.engine.engine as engine_module
import server.engine.stopwatch as stopwatch
from prime_core.sampling.prepare import prepare_rows
from server.engine.batcher import Job
from server.engine.call_cost import CallCost
from server.engine.engine import Engine
from server.engine.failures import EngineError, ModelFailedError, QueueFullError, UnavailableError
from server.engine.retry import MAX_RETRY_AFTER_S
from server.engine.warm_up import WARM_UP_TOKENS
from server.settings import Settings
from tests.server.image_model import NAME as IMAGES
from tests.server.running import NAME, Gate, make_engine, submit, wait_until

NUM_CALLS = 8


@pytest.fixture
def engine(model_path: Path) -> Engine:
    """An engine without its thread: `step` is the test's."""
    return make_engine(Settings(model=model_path, max_batch_rows=1, max_queue_rows=8, max_n=8))[0]


@pytest.fixture
def started(model_path: Path) -> Iterator[tuple[Engine, Any]]:
    engine, denoiser = make_engine(Settings(model=model_path))
    engine.start()
    wait_until(lambda: engine.state == "ready")
    yield engine, denoiser
    denoiser.hook = None
    engine.stop()
    assert not engine.alive


def job_of(engine: Engine, num_rows: int = 1, num_calls: int = NUM_CALLS) -> Job:
    """Rows of one call for each digit, which are reserved and not submitted."""
    queue = engine.queues[NAME]
    fields: dict[str, Any] = {"max_tokens": num_calls // 2, "steps": "exact", "seed": 0}
    rows = list(prepare_rows(queue.checkpoint, n=num_rows, **fields).rows)
    assert {row.remaining for row in rows} == {num_calls}
    engine.reserve(NAME, num_rows)
    return Job(NAME, rows, time.monotonic())


def submitted(engine: Engine, num_rows: int = 1, num_calls: int = NUM_CALLS) -> Job:
    job = job_of(engine, num_rows, num_calls)
    engine.submit(job)
    return job


def test_the_forecast_follows_jobs_that_come_advance_and_leave(engine: Engine) -> None:
    queue = engine.queues[NAME]
    queue.stopwatch.cost = CallCost(1.0, 0.0)
    first = submitted(engine)
    assert queue.seconds_until_free(1) == NUM_CALLS
    second = submitted(engine)
    assert queue.seconds_until_free(2) == 2 * NUM_CALLS
    engine.step()
    queue.stopwatch.cost = CallCost(1.0, 0.0)
    assert queue.seconds_until_free(2) == 2 * NUM_CALLS - 1
    first.done.cancel()
    queue.admit()
    assert queue.seconds_until_free(1) == NUM_CALLS
    second.done.cancel()
    queue.admit()
    assert queue.seconds_until_free(1) == 0
    assert engine.held_rows == 0


def test_the_least_time_of_rows_is_that_of_the_longest_one(engine: Engine) -> None:
    queue = engine.queues[NAME]
    queue.stopwatch.fastest_s = 0.5
    assert queue.least_seconds(job_of(engine, num_rows=3).rows) == 0.5 * NUM_CALLS
    assert queue.least_seconds([]) == 0


def test_a_call_is_timed_over_the_tokens_of_all_its_rows(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make_engine(Settings(model=model_path, max_batch_rows=3))
    queue = engine.queues[NAME]
    watched: list[int] = []
    timed: list[int] = []
    watch = queue.stopwatch.call
    monkeypatch.setattr(queue.stopwatch, "call", lambda tokens: (watched.append(tokens), watch(tokens))[1])
    monkeypatch.setattr(queue.stopwatch, "ended", lambda begun_s, tokens, **_: timed.append(tokens))
    submitted(engine, num_rows=3, num_calls=2 * 5)
    engine.step()
    assert set(watched) == {3 * 5} and timed == [3 * 5]


def test_tokens_of_calls_are_counted_and_those_that_only_fill_them_up(model_path: Path) -> None:
    engine, denoiser = make_engine(Settings(model=model_path, max_batch_rows=3))
    denoiser.fill = lambda lengths: [7, 4]

    def counted(name: str) -> float | None:
        return engine.metrics.registry.get_sample_value(name, {"model": NAME})

    submitted(engine, num_rows=3, num_calls=2 * 5)
    for number in (1, 2):
        engine.step()
        assert counted("prime_call_tokens_total") == number * 3 * 5
        assert counted("prime_call_filling_tokens_total") == number * (7 + 4)
    assert counted("prime_batch_padding_ratio_sum") == pytest.approx(2 * 11 / 26)


def test_jobs_wait_until_their_first_call_and_run_until_their_last(engine: Engine) -> None:
    def gauges() -> list[float | None]:
        values = engine.metrics.registry.get_sample_value
        return [values(f"prime_num_requests_{what}", {"model": NAME}) for what in ("running", "waiting")]

    submitted(engine, num_calls=2)
    submitted(engine, num_calls=2)
    assert gauges() == [0, 2]
    engine.step()
    assert gauges() == [1, 1]
    submitted(engine, num_calls=2)  # one that no turn has looked at yet
    assert gauges() == [1, 2]
    while engine.step():
        pass
    assert gauges() == [0, 0]


def test_the_start_of_a_job_is_that_of_its_first_call(engine: Engine) -> None:
    job = submitted(engine, num_calls=4)
    engine.step()
    started_s = job.started_s
    assert started_s is not None and started_s >= job.arrived_s
    engine.step()
    assert job.started_s == started_s


def test_jobs_that_fail_together_have_an_error_each(model_path: Path) -> None:
    engine, denoiser = make_engine(Settings(model=model_path, max_batch_rows=2))

    def fail(lengths: Sequence[int]) -> None:
        raise RuntimeError("planted")

    denoiser.hook = fail
    jobs = [submitted(engine), submitted(engine)]
    engine.step()
    first, second = (job.done.exception(0) for job in jobs)
    assert isinstance(first, EngineError) and isinstance(second, EngineError)
    assert first is not second  # each caller raises its own, which holds what called it


def test_memory_is_given_back_after_a_call_that_ran_out_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []
    monkeypatch.setattr(
        "server.engine.model_queue.free_cached_memory", lambda: freed.append(held[0]() is None)
    )
    denoiser: Any = engine.queues[NAME].checkpoint.denoiser

    def no_memory(lengths: Sequence[int]) -> None:
        allocated = torch.zeros(3)
        held.append(weakref.ref(allocated))
        raise MemoryError

    submitted(engine)
    denoiser.hook = no_memory
    engine.step()
    assert freed == [True], "what the call had allocated cannot be given back while its traceback lives"


def test_calls_that_a_success_parts_are_no_series_of_faults(started: tuple[Engine, Any]) -> None:
    engine, denoiser = started

    def raise_on_small_rows(lengths: Sequence[int]) -> None:
        if 4 in lengths:
            raise RuntimeError("a fault of the request")

    denoiser.hook = raise_on_small_rows
    denoiser.lengths.clear()
    for _ in range(3):
        for _ in range(engine_module.MAX_FAULTS - 1):
            with pytest.raises(EngineError):
                submit(engine, 4).done.result(60)
        submit(engine, 5).done.result(60)
    assert [WARM_UP_TOKENS] not in denoiser.lengths


def test_the_engine_tries_a_request_of_its_own_once_for_each_series_of_faults(
    started: tuple[Engine, Any],
) -> None:
    engine, denoiser = started

    def raise_on_small_rows(lengths: Sequence[int]) -> None:
        if 4 in lengths:
            raise RuntimeError("a fault of the request")

    denoiser.hook = raise_on_small_rows
    denoiser.lengths.clear()
    for number in range(1, 3):
        for _ in range(engine_module.MAX_FAULTS):
            with pytest.raises(EngineError):
                submit(engine, 4).done.result(60)
        submit(engine, 5).done.result(60)
        assert denoiser.lengths.count([WARM_UP_TOKENS]) == number


def test_a_request_of_its_own_that_runs_out_of_memory_does_not_give_the_model_up(
    started: tuple[Engine, Any],
) -> None:
    engine, denoiser = started

    def fail(lengths: Sequence[int]) -> None:
        if WARM_UP_TOKENS in lengths:
            raise MemoryError
        raise RuntimeError("a fault of the request")

    denoiser.hook = fail
    denoiser.lengths.clear()
    for _ in range(engine_module.MAX_FAULTS):
        with pytest.raises(EngineError):
            submit(engine, 4).done.result(60)
    wait_until(lambda: [WARM_UP_TOKENS] in denoiser.lengths)
    denoiser.hook = None
    submit(engine, 4).done.result(60)
    assert not engine.queues[NAME].failed


def test_the_first_call_of_a_request_ends_what_the_warm_up_has_told(started: tuple[Engine, Any]) -> None:
    engine, _ = started
    watch = engine.queues[NAME].stopwatch
    watch.seconds_per_call = 1000.0
    rows = prepare_rows(engine.queues[NAME].checkpoint, max_tokens=3, steps=1, seed=0).rows
    engine.reserve(NAME, 1)
    job = Job(NAME, list(rows), time.monotonic())
    engine.submit(job)
    job.done.result(60)
    assert watch.seconds_per_call == pytest.approx(watch.last_s)


def test_a_stopped_engine_takes_nothing_not_even_what_has_room(started: tuple[Engine, Any]) -> None:
    engine, _ = started
    job = job_of(engine)
    engine.stop()
    assert not engine.alive
    with pytest.raises(UnavailableError):
        engine.submit(job)
    assert engine.held_rows == 1  # the caller's, to be given back
    engine.release(NAME, 1)
    with pytest.raises(UnavailableError):
        engine.reserve(NAME, 1)
    assert engine.held_rows == 0


def test_a_model_that_has_failed_takes_nothing_not_even_what_has_room(engine: Engine) -> None:
    job = job_of(engine)
    queue = engine.queues[NAME]
    queue.fail_all(ModelFailedError("the model has failed"), for_good=True)
    queue.fail_all(UnavailableError("the engine has stopped"))
    with pytest.raises(ModelFailedError):
        engine.submit(job)
    assert engine.held_rows == 1
    engine.release(NAME, 1)
    with pytest.raises(ModelFailedError):
        engine.reserve(NAME, 1)


def test_retry_after_for_want_of_memory_waits_for_as_many_rows_as_the_request_has(model_path: Path) -> None:
    engine, _ = make_engine(Settings(model=model_path, max_batch_rows=1, max_queue_rows=8, max_n=8))
    engine.queues[NAME].stopwatch.cost = CallCost(1.0, 0.0)
    submitted(engine, num_rows=1)
    job = submitted(engine, num_rows=3)
    engine._room.max_bytes = engine._room._bytes
    refused = job_of(engine, num_rows=2)
    with pytest.raises(QueueFullError) as caught:
        engine.submit(refused)
    assert caught.value.retry_after_s >= 4 * NUM_CALLS  # the first job alone frees only one
    assert refused.num_bytes == 0
    engine.release(NAME, 2)
    job.done.cancel()
    engine.queues[NAME].admit()
    engine.reserve(NAME, 2)
    engine.submit(refused)


def test_retry_after_has_an_end(engine: Engine) -> None:
    engine.queues[NAME].stopwatch.cost = CallCost(1e6, 0.0)
    submitted(engine, num_rows=8)
    with pytest.raises(QueueFullError) as caught:
        engine.reserve(NAME, 1)
    assert caught.value.retry_after_s == MAX_RETRY_AFTER_S


def test_retry_after_is_no_later_than_the_deadlines_of_those_in_front(engine: Engine) -> None:
    engine.queues[NAME].stopwatch.cost = CallCost(1e6, 0.0)
    for num_rows, allowed_s in ((3, 40.0), (5, 20.0)):
        job = job_of(engine, num_rows)
        job.deadline_s = job.arrived_s + allowed_s
        engine.submit(job)
    for num_rows, soonest_s in ((5, 20), (6, 40)):
        with pytest.raises(QueueFullError) as caught:
            engine.reserve(NAME, num_rows)
        assert soonest_s - 2 <= caught.value.retry_after_s <= soonest_s


def test_a_model_with_slow_calls_neither_hides_a_hang_of_another_nor_is_one(
    model_path: Path, images_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, text = make_engine(Settings.model_validate({"model": [model_path, images_path]}))
    images: Any = engine.queues[IMAGES].checkpoint.denoiser
    engine.start()
    wait_until(lambda: engine.state == "ready")
    monkeypatch.setattr(stopwatch, "MIN_STALL_S", 0.0)
    for name, seconds in ((NAME, 0.0), (IMAGES, 1e6)):  # calls of text should take no time at all
        engine.queues[name].stopwatch.seconds_per_call = seconds
        engine.queues[name].stopwatch._tokens_per_call = 1e6
    gates = {name: Gate() for name in (IMAGES, NAME)}
    text.hook, images.hook = gates[NAME], gates[IMAGES]
    rows = prepare_rows(engine.queues[IMAGES].checkpoint, steps=1, seed=0).rows
    engine.reserve(IMAGES, 1)
    job = Job(IMAGES, list(rows), time.monotonic())
    engine.submit(job)
    assert gates[IMAGES].entered.wait(60)
    assert not engine.stalled
    hung = submit(engine, 4)
    gates[IMAGES].opened.set()
    assert gates[NAME].entered.wait(60)
    engine.queues[IMAGES].stopwatch.seconds_per_call = 1e6
    assert engine.stalled
    gates[NAME].opened.set()
    for each in (job, hung):
        each.done.result(60)
    engine.stop()
