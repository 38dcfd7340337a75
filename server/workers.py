"""The threads beside the engine's, and waiting for them no longer than a request may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.engine.failures import DeadlineError

# All of it is short and mostly one-threaded; more threads would only compete with the engine.
PREPARE_THREADS = 2
ANSWER_THREADS = 2

_Result = TypeVar("_Result")


class Workers:
    """Threads by what they do, so that no kind of work waits for another; a thread is started when it is first needed.

    Attributes:
        answers: for texts and pictures that are finished.
        frames: for those on their way, in streams; one, so that readers share a bounded part of the machine.
    """

    def __init__(self, models: Collection[str]) -> None:
        """Have no threads yet.

        Args:
            models: names of the loaded models.
        """
        self._prepare = {
            name: ThreadPoolExecutor(PREPARE_THREADS, f"prime-prepare-{name}") for name in models
        }
        self.answers = ThreadPoolExecutor(ANSWER_THREADS, "prime-answer")
        self.frames = ThreadPoolExecutor(1, "prime-frames")

    def prepare(self, model: str) -> Executor:
        """Return those for tokenization, plans and given pictures; each model's are its own, as its turns are."""
        return self._prepare[model]


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


async def disconnected(request: Request) -> None:
    """Wait until the client of a request, whose body has been read, has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
