"""Waiting for the engine, a thread or a client: whoever is first, and no longer than a request may take."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.engine.batcher import Job
from server.engine.failures import DeadlineError

_Result = TypeVar("_Result")


async def in_time(
    work: Callable[[], _Result], threads: Executor, request: Request, deadline_s: float
) -> _Result:
    """Return what some work gives, unless the client goes or the time is over before it does.

    Work that was given up before it began is never begun; what was begun ends by itself, and nobody hears of it.

    Args:
        work: what to do, in a thread.
        threads: one of which does it.
        request: whose work it is; its body has been read.
        deadline_s: when to give it up, as `time.monotonic()` will tell.

    Raises:
        ClientDisconnect: the client has gone.
        DeadlineError: the time is over.
    """
    done = asyncio.get_running_loop().run_in_executor(threads, work)
    gone = asyncio.ensure_future(disconnected(request))
    either: set[asyncio.Future[Any]] = {done, gone}
    try:
        timeout_s = max(0.0, deadline_s - time.monotonic())
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise ClientDisconnect if gone.done() else DeadlineError("the deadline has passed")
    finally:
        gone.cancel()
        done.cancel()


async def job_done(job: Job, request: Request) -> None:
    """Wait until the engine has finished a job, the client has gone or the time is over, whichever is first.

    The engine gives up what is late between its steps; the limit here also holds while a step hangs.

    Raises:
        Exception: with which the engine has failed the job.
        ClientDisconnect: the client has gone.
        DeadlineError: the time is over.
    """
    finished = finish_of(job)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await first_of(finished.wait(), gone, timeout_s=job.seconds_left)
        if gone.done() and not job.done.done():
            raise ClientDisconnect
        if job.done.cancel():  # it was not finished
            raise DeadlineError("the deadline has passed")
        job.done.result()
    finally:
        gone.cancel()


def finish_of(job: Job) -> asyncio.Event:
    """Return what is set in this event loop when the engine has finished a job."""
    finished, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell(done: Future[None]) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that has closed
            loop.call_soon_threadsafe(finished.set)

    job.done.add_done_callback(tell)
    return finished


async def first_of(*awaitables: Awaitable[object], timeout_s: float | None = None) -> None:
    """Wait until one of them is done, or for so long; those that were given as coroutines end with it."""
    waiting = {asyncio.ensure_future(each) for each in awaitables}
    try:
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting.difference(awaitables):
            task.cancel()


async def disconnected(request: Request) -> None:
    """Wait until the client of a request, whose body has been read, has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
