"""The life of one request between its route and the engine, the same for text, images and scores.

reserve room -> prepare rows (thread) -> submit to the engine -> await -> finish rows (thread) -> count -> answer

What is prepared and what is made of finished rows is a `Recipe`, of `server.text`, `server.images` or `server.score`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.prepare import NonFiniteError
from prime_core.sampling.row import Row
from prime_core.sampling.stepper import AnyRow
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
from server.http.deadline import allowed_seconds
from server.http.errors import ApiError
from server.metrics import Metrics
from server.refusals import check_deadline, failure_of, reserve, submit
from server.schemas.base import Limits, Timings
from server.waiting import disconnected, finish_of, first_of, in_time, job_done
from server.workers import Workers


class Prepared(Protocol):
    """What was made of a request for the engine: its rows, of one canvas or of several."""

    @property
    def rows(self) -> Sequence[AnyRow]:
        """Its rows in the order of its outputs."""


_Answer = TypeVar("_Answer")
_Frames = TypeVar("_Frames")
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
        if getattr(request.state, "invalid_http", False):
            service.engine.metrics.reject(getattr(request.state, "model", ""), "invalid")
        return Response(status_code=499)  # nobody reads it


@dataclass(frozen=True, eq=False, slots=True)
class Recipe(Generic[_Prepared, _Answer]):
    """How a checked request becomes rows, and its finished rows an answer.

    Attributes:
        num_rows: rows that it will have.
        prepare: makes the rows, in a thread; a `CanvasError` says that the request does not fit the model.
        finish: makes the answer from what ``prepare`` made, whose rows are done, and the job; in a thread.
        count: counts the answer.
    """

    num_rows: int
    prepare: Callable[[], _Prepared]
    finish: Callable[[_Prepared, Job], _Answer]
    count: Callable[[Metrics, _Answer], None]


async def start_request(
    service: Service,
    queue: ModelQueue,
    request: Request,
    recipe: Recipe[_Prepared, _Answer],
    *,
    followed: bool = False,
) -> Running[_Prepared, _Answer]:
    """Bring a checked request into the engine; follow with `Running.answer`, or `Running.changes` and then that.

    Args:
        service: the engine and the threads.
        queue: the model.
        request: the HTTP request, to see its client go; its body has been read.
        recipe: what is to be done.
        followed: whether `Running.changes` will be asked for.

    Raises:
        ApiError: 422 if it does not fit the model, 429 or 503 if it cannot be taken, 504 if it would take too long,
            or if it was not even prepared in time.
        ClientDisconnect: if the client went away meanwhile.
    """
    engine, model = service.engine, queue.name
    allowed_s = allowed_seconds(request, service.max_request_s)
    arrived_s = time.monotonic()
    deadline_s = arrived_s + allowed_s
    reserve(engine, model, recipe.num_rows, service.max_request_s)
    submitted = False
    try:
        prepared = await in_time(recipe.prepare, service.workers.prepare(model), request, deadline_s)
        rows = list(prepared.rows)
        assert len(rows) == recipe.num_rows, "the engine gives back the room of the rows that it gets"
        feed = _feed_of(rows, queue) if followed else None
        job = Job(model, rows, arrived_s, feed=feed, deadline_s=deadline_s)
        check_deadline(engine, job)
        submit(engine, job, service.max_request_s)
        submitted = True
        # Its line in the log tells of them, and those that are not finished when it ends are cancelled.
        request.state.jobs = [*getattr(request.state, "jobs", []), job]
        return Running(service, queue, request, recipe, prepared, job)
    except CanvasError as error:
        raise ApiError(422, "invalid_value", str(error), param=error.param) from None
    except (DeadlineError, UnavailableError) as error:
        raise failure_of(engine, model, error, allowed_s) from None
    except (ClientDisconnect, asyncio.CancelledError):
        engine.metrics.fail(model, "cancelled")
        raise
    except ApiError:
        raise  # is counted where it was made
    except Exception:
        if not submitted:
            engine.metrics.fail(model, "internal_error")
        raise
    finally:
        if not submitted:
            engine.release(model, recipe.num_rows)


def _feed_of(rows: Sequence[AnyRow], queue: ModelQueue) -> Feed:
    sampled = [row for row in rows if isinstance(row, Row)]
    assert len(sampled) == len(rows), "only sampling has states to follow"
    return Feed(sampled, queue.checkpoint.codec.mask_index)


@dataclass(frozen=True, eq=False, slots=True)
class Running(Generic[_Prepared, _Answer]):
    """A request in the engine."""

    service: Service
    queue: ModelQueue
    request: Request
    recipe: Recipe[_Prepared, _Answer]
    prepared: _Prepared
    job: Job

    async def answer(self) -> _Answer:
        """Wait for the rows, and return what becomes of them, counted.

        Raises:
            ApiError: 500 or 503 if the request fails, 504 if it takes too long.
            ClientDisconnect: if the client went away; its rows are free within a step.
        """
        engine, job = self.service.engine, self.job
        finish = partial(self.recipe.finish, self.prepared, job)
        try:
            await job_done(job, self.request)
            answer = await in_time(finish, self.service.workers.answers, self.request, job.deadline_s)
        except (NonFiniteError, MemoryFullError, DeadlineError, EngineError, UnavailableError) as error:
            job.counted = True
            raise failure_of(engine, job.model, error, job.allowed_s) from None
        self.recipe.count(engine.metrics, answer)
        job.counted = True
        return answer

    async def changes(self) -> AsyncIterator[Changes]:
        """Yield what happens to the rows, until they are done or have failed; `answer` tells which.

        Changes come as fast as they are taken, and `MIN_INTERVAL_S` after that; what happens in between is merged. So a
        stream makes no frame while its last one is still being made or sent.

        Raises:
            ClientDisconnect: if the client went away; its rows are free within a step.
        """
        feed, finished = self.job.feed, finish_of(self.job)
        assert feed is not None, "the request was started to be followed"
        gone = asyncio.ensure_future(disconnected(self.request))
        try:
            ended = False
            while not ended:
                await first_of(feed.wait(), finished.wait(), gone, timeout_s=self.job.seconds_left)
                if gone.done() and not finished.is_set():
                    raise ClientDisconnect
                # Asked before what is there is taken, or the last of it could be missed.
                ended = finished.is_set() or not self.job.seconds_left
                changes = feed.take(self.job.started_s)
                if changes.rows:
                    yield changes
                await first_of(finished.wait(), asyncio.sleep(MIN_INTERVAL_S))
        finally:
            gone.cancel()

    async def in_thread(self, call: Callable[..., _Frames], *arguments: Any) -> _Frames:
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
