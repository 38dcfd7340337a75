"""Who leaves before the end: everybody who is late, in whatever order they came, and each only once."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

import server.engine.departures as departures_module
from server.engine.batcher import Job
from server.engine.departures import Departures


class Clock:
    """Stands in for the module `time`; it moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(departures_module, "time", clock)
    return clock


def job_with(deadline_s: float) -> Job:
    rows: list[Any] = []
    return Job("model", rows, arrived_s=0.0, deadline_s=deadline_s)


def watched(*jobs: Job) -> Departures:
    departures = Departures()
    for job in jobs:
        departures.watch(job)
    return departures


def test_each_is_given_up_at_its_own_deadline(clock: Clock) -> None:
    middle, last, first, never = (job_with(clock.now_s + s) for s in (20, 30, 10, math.inf))
    held = [middle, last, first, never]
    departures = watched(*held)
    assert not departures.due
    for job in (first, middle, last):
        clock.now_s = job.deadline_s - 1
        assert not departures.due
        assert departures.take(lambda: held) == ([], [])
        clock.now_s = job.deadline_s
        assert departures.due
        assert departures.take(lambda: held) == ([], [job])
        held.remove(job)
    clock.now_s += 1e9
    assert not departures.due


def test_those_that_have_gone_leave_once_and_alone(clock: Clock) -> None:
    gone, stays = job_with(math.inf), job_with(math.inf)
    held = [gone, stays]
    departures = watched(*held)
    assert gone.done.cancel()
    assert departures.due
    assert departures.take(lambda: held) == ([gone], [])
    assert not departures.due


def test_those_that_have_gone_together_leave_together(clock: Clock) -> None:
    held = [job_with(math.inf) for _ in range(3)]
    departures = watched(*held)
    for job in held[:2]:
        job.done.cancel()
    assert departures.take(lambda: held) == (held[:2], [])
    assert not departures.due


def test_who_has_gone_and_is_late_leaves_once(clock: Clock) -> None:
    job = job_with(clock.now_s)
    departures = watched(job)
    job.done.cancel()
    assert departures.take(lambda: [job]) == ([], [job])


def test_jobs_that_are_finished_are_no_reason_to_look(clock: Clock) -> None:
    job = job_with(math.inf)
    departures = watched(job)
    job.done.set_result(None)
    assert not departures.due
