"""An engine whose calls are queued ahead, as on a GPU: the same outputs, and nobody is told before all is known."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.transfers import HostCopy
from prime_core.sampling import step_parts
from prime_core.sampling.prepare import NonFiniteError, prepare_rows
from prime_core.sampling.row import Row
from prime_core.sampling.step_parts import StepResult
from prime_core.sampling.stepper import QueuedCall, Stepper
from server.engine import under_way
from server.engine.batcher import Job
from server.engine.engine import Engine
from server.engine.failures import DeadlineError, EngineError, UnavailableError
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


def assert_as_alone(engine: Engine, job: Job) -> None:
    """A job is finished, and its rows are what they are without an engine."""
    assert job.done.result(0) is None
    for row in job.rows:
        assert isinstance(row, Row) and torch.equal(row.y, alone(engine, row.length).y)


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
        assert_as_alone(engine, job)
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
    assert_as_alone(engine, good)
    assert engine.metrics.registry.get_sample_value("prime_model_up", {"model": NAME}) == 1


def poison(monkeypatch: pytest.MonkeyPatch, length: int, number: int) -> None:
    """Let the logits of all rows be NaN in the call that brings rows of a length to an event."""
    head = Hooked.head
    bad = [False]
    queue = Stepper.queue

    def noting(stepper: Stepper, rows: Sequence[Any]) -> QueuedCall:
        bad[0] = any(row.length == length and row.next_event == number for row in rows)
        laid = sorted(rows, key=lambda row: row.length)
        mine = [index for index, row in enumerate(laid) if row.length == length]
        counts = [len(row.event.positions) for row in laid]
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
    assert_as_alone(engine, staying)


@pytest.mark.usefixtures("depth")
def test_calls_end_though_everybody_has_left(built: tuple[Engine, Hooked]) -> None:
    engine, _ = built
    job = submitted(engine, 6)
    for _ in range(2):
        engine.step()
    job.done.cancel()
    run(engine)
    assert engine.queues[NAME].num_under_way == 0 and not engine.step()


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
    for job in jobs:
        assert_as_alone(engine, job)


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
    for job in (first, third):
        assert_as_alone(engine, job)


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
    bad, good = submitted(engine, 5), submitted(engine, 4)
    engine.queues[NAME].batcher.cap.now = 1  # each in calls of its own
    run(engine)
    with pytest.raises(EngineError):
        bad.done.result(0)
    assert_as_alone(engine, good)


@pytest.mark.usefixtures("depth")
def test_memory_that_runs_out_behind_the_draw_has_moved_no_row(
    built: tuple[Engine, Hooked], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = built
    struck: list[int] = []

    class Short(HostCopy):
        """No memory for the first row that comes home."""

        def __init__(self, tensor: Tensor) -> None:
            if not struck:
                struck.append(len(tensor))
                raise MemoryError
            super().__init__(tensor)

    monkeypatch.setattr(step_parts, "HostCopy", Short)
    jobs = [submitted(engine, 5), submitted(engine, 4)]
    followers = [Follower(), Follower()]
    for job, follower in zip(jobs, followers, strict=True):
        job.feed = follower  # type: ignore[assignment]
    run(engine)
    assert struck == [4]
    for job, follower, length in zip(jobs, followers, (5, 4), strict=True):
        assert len(follower.results) == 2 * length
        assert_as_alone(engine, job)


@pytest.mark.usefixtures("depth")
def test_a_deadline_passes_while_calls_are_under_way(built: tuple[Engine, Hooked]) -> None:
    engine, _ = built
    job = submitted(engine, 6)
    for _ in range(2):
        engine.step()
    job.deadline_s = 0.0
    engine.queues[NAME]._departures._soonest_s = 0.0
    run(engine)
    with pytest.raises(DeadlineError):
        job.done.result(0)


@pytest.mark.usefixtures("depth")
def test_new_weights_let_go_of_the_old_though_calls_were_under_way(built: tuple[Engine, Hooked]) -> None:
    engine, _ = built
    queue = engine.queues[NAME]
    old = weakref.ref(queue._generations.current.stepper)
    job = submitted(engine, 6)
    for _ in range(4):
        engine.step()
    job.done.cancel()
    queue.admit()
    assert old() is not None and queue.num_under_way
    queue.replace(queue.checkpoint)
    queue.admit()
    assert old() is None and not queue.num_under_way
    later = submitted(engine, 3)
    run(engine)
    assert later.done.result(0) is None


@pytest.mark.usefixtures("depth")
def test_a_stop_fails_whoever_waits_for_calls_under_way(built: tuple[Engine, Hooked]) -> None:
    engine, _ = built
    job = submitted(engine, 4)
    for _ in range(8):
        engine.step()
    assert job.rows[0].done and not job.done.done()
    engine.abandon()
    with pytest.raises(UnavailableError):
        job.done.result(0)
    assert engine.held_rows == 0


class Device:
    """In place of a GPU: it makes one call after the other, and those of a model take so long. Nothing is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost_s: dict[int, float]) -> None:
        self.free_s = 0.0
        self.busy_s = dict.fromkeys(cost_s, 0.0)

        def queued(stepper: Stepper, rows: Sequence[Any]) -> QueuedCall:
            model = stepper.codec.vocab_size
            done_s = self.free_s = max(self.free_s, time.monotonic()) + cost_s[model]
            self.busy_s[model] += cost_s[model]
            events = [row.event for row in rows]
            for row in rows:
                row.next_event += 1

            def wait() -> list[StepResult]:
                time.sleep(max(0.0, done_s - time.monotonic()))
                return [StepResult(event.positions, event.due * 0, True, event.remasked) for event in events]

            call = QueuedCall(rows, [])
            call.results = wait  # type: ignore[method-assign]
            return call

        monkeypatch.setattr(Stepper, "queue", queued)


@pytest.mark.usefixtures("depth")
def test_models_share_a_device_by_time_and_each_is_timed_alone(
    model_path: Path, images_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate({"model": [model_path, images_path], "max_batch_rows": 1})
    engine, _ = make_engine(settings)
    text, images = (queue.checkpoint.codec.vocab_size for queue in engine.queues.values())
    device = Device(monkeypatch, {text: 0.005, images: 0.05})
    jobs = []
    for queue, fields in zip(engine.queues.values(), ({"max_tokens": 64}, {}), strict=True):
        rows = prepare_rows(queue.checkpoint, steps="exact", seed=1, **fields).rows  # type: ignore[arg-type]
        engine.reserve(queue.name, 1)
        jobs.append(Job(queue.name, list(rows), time.monotonic()))
        engine.submit(jobs[-1])
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        assert engine.step()
    assert not any(job.done.done() for job in jobs), "one was not busy all the time"
    assert all(busy_s >= 0.35 * sum(device.busy_s.values()) for busy_s in device.busy_s.values()), (
        device.busy_s
    )
    text_s, images_s = (queue.stopwatch.seconds_per_call for queue in engine.queues.values())
    assert 0.004 < text_s < 0.02 and 0.045 < images_s < 0.1


def test_calls_that_end_in_a_row_tell_nothing_of_the_fastest(
    built: tuple[Engine, Hooked], depth: int
) -> None:
    engine, denoiser = built
    denoiser.hook = lambda lengths: time.sleep(0.02)  # where a device computes, this host is asleep
    submitted(engine, 10)
    run(engine)
    watch = engine.queues[NAME].stopwatch
    assert watch.fastest_s > 0.015 and watch.last_s < 0.015
