"""The life of one request between its route and the engine, the same for text, images and scores.

reserve room -> prepare rows (thread) -> submit to the engine -> await -> finish rows (thread) -> answer

What is prepared and what is made of finished rows is in `server.text`, `server.images` and `server.score`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from prime_core.canvas import CanvasError
from prime_core.prepare import NonFiniteError
from prime_core.row import Row
from prime_core.stepper import AnyRow
from server.engine.batcher import Job
from server.engine.engine import Engine
from server.engine.failures import (
    DeadlineError,
    EngineError,
    MemoryFullError,
    UnavailableError,
)
from server.engine.feed import Changes, Feed
from server.engine.model_queue import ModelQueue
from server.http.body import Bodies
from server.http.deadline import deadline_of
from server.http.errors import ApiError
from server.refusals import check_deadline, failure_of, reserve, submit
from server.schemas.base import Limits, Timings
from server.workers import Workers, disconnected, in_time


class Prepared(Protocol):
    """What was made of a request for the engine: its rows, of one canvas or of several."""

    @property
    def rows(self) -> Sequence[AnyRow]:
        """Its rows in the order of its outputs."""


_Answer = TypeVar("_Answer")
_Prepared = TypeVar("_Prepared", bound=Prepared)

# Between a frame of a stream and the next change that is looked at: a frame is made of the whole row, on the CPU that
# the engine's thread needs, and nobody sees more than 50 a second.
MIN_INTERVAL_S = 0.02


@dataclass(frozen=True)
class Service:
    """What every route that samples needs.

    Attributes:
        engine: runs the rows.
        limits: largest values of a request, by the name of the model.
        workers: threads for whatever takes a while, so that the event loop never waits for it.
        bodies: reads those of requests.
        max_request_s: seconds in which a request must be answered once it was read.
    """

    engine: Engine
    limits: Mapping[str, Limits]
    workers: Workers
    bodies: Bodies
    max_request_s: float


async def answered(service: Service, request: Request, answer: Awaitable[Response]) -> Response:
    """Await an answer; count a refusal under the model that the request was for."""
    try:
        return await answer
    except ApiError as error:
        if error.status < 500 and error.status != 429:
            service.engine.metrics.reject(getattr(request.state, "model", ""), "invalid")
        raise
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it


async def run_request(
    service: Service,
    request: Request,
    model: str,
    num_rows: int,
    prepare: Callable[[], _Prepared],
    finish: Callable[[_Prepared, Job], _Answer],
) -> _Answer:
    """Take a checked request through the engine.

    Args:
        service: the engine and the threads.
        request: the HTTP request, to see its client go; its body has been read.
        model: name of the model.
        num_rows: rows it will have.
        prepare: makes the rows, in a thread.
        finish: makes the answer from what ``prepare`` made, whose rows are done, and the job, in a thread.

    Raises:
        ApiError: 422 if it does not fit the model, 429 or 503 if it cannot be taken, 500 if it fails, 504 if it
            takes too long.
        ClientDisconnect: if the client went away; its rows are free within a step.
    """
    running = await start_request(service, request, model, num_rows, prepare)
    return await running.answer(finish)


async def start_request(
    service: Service,
    request: Request,
    model: str,
    num_rows: int,
    prepare: Callable[[], _Prepared],
    *,
    followed: bool = False,
) -> Running[_Prepared]:
    """Bring a checked request into the engine; follow with `Running.answer`, or `Running.changes` and then that.

    Args:
        service: as for `run_request`, and so are ``request``, ``model``, ``num_rows`` and ``prepare``.
        request: see there.
        model: see there.
        num_rows: see there.
        prepare: see there.
        followed: whether `Running.changes` will be asked for.

    Raises:
        ApiError: 422 if it does not fit the model, 429 or 503 if it cannot be taken, 504 if it would take too long,
            or if it was not even prepared in time.
        ClientDisconnect: if the client went away meanwhile.
    """
    engine = service.engine
    arrived_s, deadline_s = time.monotonic(), deadline_of(request, service.max_request_s)
    reserve(engine, model, num_rows)
    submitted = False
    try:
        prepared = await in_time(prepare, service.workers.prepare(model), request, deadline_s)
        rows = list(prepared.rows)
        feed = _feed_of(rows, engine.queues[model]) if followed else None
        job = Job(model, rows, arrived_s, feed=feed, deadline_s=deadline_s)
        check_deadline(engine, job)
        submit(engine, job)
        submitted = True
        # Its line in the log tells of them, and those that are not finished when it ends are cancelled.
        request.state.jobs = [*getattr(request.state, "jobs", []), job]
        return Running(service, request, prepared, job)
    except CanvasError as error:
        raise ApiError(422, "invalid_value", str(error), param=error.param) from None
    except (DeadlineError, UnavailableError) as error:
        raise failure_of(engine, model, error) from None
    except (ClientDisconnect, asyncio.CancelledError):
        engine.metrics.fail(model, "cancelled")
        raise
    finally:
        if not submitted:
            engine.release(num_rows)


def _feed_of(rows: Sequence[AnyRow], queue: ModelQueue) -> Feed:
    sampled = [row for row in rows if isinstance(row, Row)]
    assert len(sampled) == len(rows), "only sampling has states to follow"
    return Feed(sampled, queue.checkpoint.codec.mask_index)


@dataclass(frozen=True, eq=False, slots=True)
class Running(Generic[_Prepared]):
    """A request in the engine."""

    service: Service
    request: Request
    prepared: _Prepared
    job: Job

    async def answer(self, finish: Callable[[_Prepared, Job], _Answer]) -> _Answer:
        """Wait for the rows and return what ``finish`` makes of them, in a thread.

        Raises:
            ApiError: 500 or 503 if the request fails, 504 if it takes too long.
            ClientDisconnect: if the client went away; its rows are free within a step.
        """
        engine, model = self.service.engine, self.job.model
        try:
            await _wait(self.job, self.request)
            return await self._finish(finish)
        except (NonFiniteError, MemoryFullError, DeadlineError, EngineError, UnavailableError) as error:
            raise failure_of(engine, model, error) from None

    async def _finish(self, finish: Callable[[_Prepared, Job], _Answer]) -> _Answer:
        """Return the answer of a job that the engine has finished; a client that goes now counts here."""
        work, threads = partial(finish, self.prepared, self.job), self.service.workers.answers
        try:
            return await in_time(work, threads, self.request, self.job.deadline_s)
        except (ClientDisconnect, asyncio.CancelledError):
            self.service.engine.metrics.fail(self.job.model, "cancelled")
            raise

    async def changes(self) -> AsyncIterator[Changes]:
        """Yield what happens to the rows, until they are done or have failed; `answer` tells which.

        Changes come as fast as they are taken, and `MIN_INTERVAL_S` after that; what happens in between is merged. So a
        stream makes no frame while its last one is still being made or sent.

        Raises:
            ClientDisconnect: if the client went away; its rows are free within a step.
        """
        feed, finished = self.job.feed, _finished(self.job)
        assert feed is not None, "the request was started to be followed"
        gone = asyncio.ensure_future(disconnected(self.request))
        try:
            ended = False
            while not ended:
                await _first_of(feed.wait(), finished.wait(), gone, timeout_s=self.job.seconds_left)
                if gone.done() and not finished.is_set():
                    raise ClientDisconnect
                # Asked before what is there is taken, or the last of it could be missed.
                ended = finished.is_set() or not self.job.seconds_left
                changes = feed.take(self.job.started_s)
                if changes.rows:
                    yield changes
                await _first_of(finished.wait(), asyncio.sleep(MIN_INTERVAL_S))
        finally:
            gone.cancel()

    async def in_thread(self, call: Callable[..., _Answer], *arguments: Any) -> _Answer:
        """Make a frame in a thread, so that the event loop goes on."""
        threads = self.service.workers.frames
        return await asyncio.get_running_loop().run_in_executor(threads, call, *arguments)


def timings_of(job: Job) -> Timings:
    """Return where the time of a finished job went, up to now."""
    started_s = job.arrived_s if job.started_s is None else job.started_s
    finished_s = started_s if job.finished_s is None else job.finished_s
    return Timings(
        queue_s=started_s - job.arrived_s,
        run_s=finished_s - started_s,
        total_s=time.monotonic() - job.arrived_s,
    )


async def _wait(job: Job, request: Request) -> None:
    """Wait until the engine has finished the job, the client has gone or the time is over, whichever is first.

    The engine gives up what is late between its steps; the limit here also holds while a step hangs.
    """
    finished = _finished(job)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await _first_of(finished.wait(), gone, timeout_s=job.seconds_left)
        if gone.done() and not job.done.done():
            raise ClientDisconnect
        if job.done.cancel():  # it was not finished
            raise DeadlineError("the deadline has passed")
        job.done.result()
    finally:
        gone.cancel()


def _finished(job: Job) -> asyncio.Event:
    """Return what is set in this event loop when the engine has finished the job."""
    finished, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell(done: Future[None]) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that has closed
            loop.call_soon_threadsafe(finished.set)

    job.done.add_done_callback(tell)
    return finished


async def _first_of(*awaitables: Awaitable[object], timeout_s: float | None = None) -> None:
    """Wait until one of them is done, or for so long; those that were given as coroutines end with it."""
    waiting = {asyncio.ensure_future(each) for each in awaitables}
    try:
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting.difference(awaitables):
            task.cancel()
