"""An engine whose calls are queued ahead, as on a GPU: the same outputs, and nobody is told before all is known."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prime_core.sampling.prepare import NonFiniteError, prepare_rows
from prime_core.sampling.row import Row
from prime_core.sampling.step_parts import StepResult
from prime_core.sampling.stepper import QueuedCall, Stepper
from server.engine import under_way
from server.engine.batcher import Job
from server.engine.engine import Engine
from server.engine.failures import EngineError
from server.engine.stopwatch import CallStopwatch
from server.settings import Settings
from tests.server.running import NAME, Hooked, make_engine

DEPTHS = [1, 2, 3]


@pytest.fixture(params=DEPTHS)
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many calls are under way when the next one begins."""
    monkeypatch.setattr(under_way, "num_queued", lambda device: request.param)
    return int(request.param)


@pytest.fixture
def built(model_path: Path) -> tuple[Engine, Any]:
    """An engine without its thread, and its network."""
    return make_engine(Settings(model=model_path, max_batch_rows=2, max_queue_rows=8, max_n=8))


def submitted(engine: Engine, *lengths: int) -> Job:
    """A row of each length, which takes a call for each of its 2 digits a token."""
    checkpoint = engine.queues[NAME].checkpoint
    rows = [
        prepare_rows(checkpoint, max_tokens=length, steps="exact", seed=length).rows[0] for length in lengths
    ]
    engine.reserve(NAME, len(rows))
    job = Job(NAME, rows, time.monotonic())
    engine.submit(job)
    return job


def alone(engine: Engine, length: int) -> Row:
    """The row as it is without an engine."""
    checkpoint = engine.queues[NAME].checkpoint
    (row,) = prepare_rows(checkpoint, max_tokens=length, steps="exact", seed=length).rows
    stepper = Stepper(checkpoint.denoiser, checkpoint.codec)
    while not row.done:
        stepper.step([row])
    return row


def run(engine: Engine) -> None:
    for _ in range(1000):
        if not engine.step():
            break
    else:
        raise AssertionError("the engine does not come to an end")
    assert engine.held_rows == 0
    assert len(engine.queues[NAME]._under_way) == 0


class Follower:
    """In place of a `Feed`."""

    def __init__(self) -> None:
        self.outputs: list[int] = []
        self.results: list[StepResult] = []

    def advanced(self, output: int, result: StepResult) -> None:
        self.outputs.append(output)
        self.results.append(result)


@pytest.mark.usefixtures("depth")
def test_rows_are_what_they_are_alone(built: tuple[Engine, Hooked]) -> None:
    engine, denoiser = built
    jobs = [submitted(engine, 3, 5, 2), submitted(engine, 4), submitted(engine, 1)]
    run(engine)
    num_calls = len(denoiser.lengths)
    for job in jobs:
        assert job.done.result(0) is None
        for row in job.rows:
            assert isinstance(row, Row) and torch.equal(row.y, alone(engine, row.length).y)
    assert num_calls < sum(2 * row.length for job in jobs for row in job.rows)  # they shared calls


def test_a_job_is_finished_when_its_last_call_is_over(depth: int, built: tuple[Engine, Hooked]) -> None:
    engine, denoiser = built
    job = submitted(engine, 2)
    for number in range(1, 4 + depth):
        assert engine.step()
        assert len(denoiser.lengths) == min(number, 4)
        assert len(engine.queues[NAME]._under_way) == min(number, depth, 4 + depth - number)
        assert not job.done.done() and engine.held_rows == 1
    assert job.rows[0].done
    assert engine.step()
    assert job.done.done() and engine.held_rows == 0
    assert not engine.step()


@pytest.mark.usefixtures("depth")
def test_who_follows_hears_of_every_step_in_order(built: tuple[Engine, Hooked]) -> None:
    engine, _ = built
    job, follower = submitted(engine, 3, 2), Follower()
    job.feed = follower  # type: ignore[assignment]
    run(engine)
    for output, row in enumerate(job.rows):
        assert isinstance(row, Row)
        y = torch.full_like(row.y, engine.queues[NAME].checkpoint.codec.mask_index).numpy()
        events = [row.plan.event(number) for number in range(row.plan.nfe)]
        heard = [
            result for of, result in zip(follower.outputs, follower.results, strict=True) if of == output
        ]
        assert [list(result.positions) for result in heard] == [list(event.positions) for event in events]
        for result in heard:
            y[result.positions] = result.digits
        assert (y == row.y.numpy()).all()


@pytest.mark.usefixtures("depth")
def test_a_row_without_finite_logits_fails_its_job_once(
    built: tuple[Engine, Hooked], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = built
    bad, good = submitted(engine, 5, 3), submitted(engine, 4)
    poison(monkeypatch, length=5, number=3)
    run(engine)
    with pytest.raises(NonFiniteError):
        bad.done.result(0)
    assert good.done.result(0) is None
    (row,) = good.rows
    assert torch.equal(row.y, alone(engine, 4).y)
    assert engine.metrics.registry.get_sample_value("prime_model_up", {"model": NAME}) == 1


def poison(monkeypatch: pytest.MonkeyPatch, length: int, number: int) -> None:
    """Let the logits of all rows be NaN in the call that brings rows of a length to an event."""
    head = Hooked.head
    bad = [False]
    queue = Stepper.queue

    def noting(stepper: Stepper, rows: Sequence[Any]) -> QueuedCall:
        bad[0] = any(row.length == length and row.next_event == number for row in rows)
        mine = [index for index, row in enumerate(rows) if row.length == length]
        counts = [len(row.event.positions) for row in rows]
        places.clear()
        for index in mine:
            places.extend(range(sum(counts[:index]), sum(counts[: index + 1])))
        return queue(stepper, rows)

    def poisoned(denoiser: Hooked, features: Any) -> Any:
        logits = head(denoiser, features)
        if bad[0]:
            logits[places] = math.nan
        return logits

    places: list[int] = []
    monkeypatch.setattr(Stepper, "queue", noting)
    monkeypatch.setattr(Hooked, "head", poisoned)


@pytest.mark.usefixtures("depth")
def test_a_job_that_leaves_gives_back_its_room_once(built: tuple[Engine, Hooked]) -> None:
    engine, _ = built
    leaving, staying = submitted(engine, 5), submitted(engine, 6)
    for _ in range(3):
        engine.step()
    leaving.done.cancel()
    engine.step()
    assert engine.held_rows == 1
    run(engine)
    assert staying.done.result(0) is None
    assert torch.equal(staying.rows[0].y, alone(engine, 6).y)


@pytest.mark.usefixtures("depth")
def test_calls_end_though_everybody_has_left(built: tuple[Engine, Hooked]) -> None:
    engine, _ = built
    job = submitted(engine, 6)
    for _ in range(2):
        engine.step()
    job.done.cancel()
    run(engine)


@pytest.mark.usefixtures("depth")
def test_a_call_that_runs_out_of_memory_is_made_again(built: tuple[Engine, Hooked]) -> None:
    engine, denoiser = built
    struck: list[int] = []

    def no_memory(lengths: Sequence[int]) -> None:
        if len(denoiser.lengths) > 3 and lengths.count(5) and lengths.count(4) and not struck:
            struck.append(1)
            raise MemoryError

    denoiser.hook = no_memory
    jobs = [submitted(engine, 5), submitted(engine, 4)]
    run(engine)
    denoiser.hook = None
    assert struck
    for job, length in zip(jobs, (5, 4), strict=True):
        assert job.done.result(0) is None
        assert torch.equal(job.rows[0].y, alone(engine, length).y)


@pytest.mark.usefixtures("depth")
def test_a_call_that_raises_takes_no_other_with_it(built: tuple[Engine, Hooked]) -> None:
    """Neither those before it nor those after it."""
    engine, denoiser = built
    first = submitted(engine, 2)
    for _ in range(4):
        engine.step()
    assert first.rows[0].done and not first.done.done()

    def fail(lengths: Sequence[int]) -> None:
        raise RuntimeError("planted")

    denoiser.hook = fail
    second = submitted(engine, 7)
    engine.step()
    denoiser.hook = None
    third = submitted(engine, 4)
    run(engine)
    with pytest.raises(EngineError):
        second.done.result(0)
    for job, length in ((first, 2), (third, 4)):
        assert job.done.result(0) is None
        assert torch.equal(job.rows[0].y, alone(engine, length).y)


@pytest.mark.usefixtures("depth")
def test_a_wait_that_raises_fails_those_who_were_in_that_call(
    built: tuple[Engine, Hooked], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = built
    results = QueuedCall.results

    def fail(call: QueuedCall) -> list[StepResult]:
        if any(row.length == 5 for row in call.rows):
            raise RuntimeError("CUDA error: planted")
        return results(call)

    monkeypatch.setattr(QueuedCall, "results", fail)
    bad = submitted(engine, 5)
    run(engine)
    with pytest.raises(EngineError):
        bad.done.result(0)
    good = submitted(engine, 4)
    run(engine)
    assert good.done.result(0) is None


def test_a_call_that_ran_behind_others_is_timed_from_their_end() -> None:
    watch = CallStopwatch()
    begun_s = time.monotonic()
    time.sleep(0.05)
    watch.ended(begun_s, 16)
    assert watch.last_s >= 0.05
    watch.ended(begun_s, 16)
    assert watch.last_s < 0.05
