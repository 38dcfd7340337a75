"""Which jobs leave before they are finished: their callers have gone, or their time is over."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from server.engine.batcher import Job


class Leaving(NamedTuple):
    """Jobs that leave before they are finished.

    Attributes:
        gone: nobody waits for them.
        late: their deadline has passed.
    """

    gone: Sequence[Job]
    late: Sequence[Job]


class Departures:
    """Finds such jobs between two steps, and looks through the others only when there are any."""

    def __init__(self) -> None:
        """Watch nobody yet."""
        self._cancelled: deque[Future[None]] = deque()
        self._soonest_s = math.inf  # no job that is held has an earlier deadline

    def watch(self, job: Job) -> None:
        """Begin to watch a job. Any thread that keeps others from `take` meanwhile."""
        self._soonest_s = min(self._soonest_s, job.deadline_s)
        job.done.add_done_callback(self._note)

    def _note(self, done: Future[None]) -> None:
        """Note a job by its future, which does not lead back to it: a cycle would keep its rows alive."""
        if done.cancelled():
            self._cancelled.append(done)

    @property
    def due(self) -> bool:
        """Whether anybody may have to leave now."""
        return bool(self._cancelled) or time.monotonic() >= self._soonest_s

    def take(self, held: Callable[[], Sequence[Job]]) -> Leaving:
        """Return the jobs that have to leave now.

        Args:
            held: gives all jobs that were watched and are not finished.
        """
        if not self.due:
            return Leaving([], [])
        now_s = time.monotonic()
        cancelled = {self._cancelled.popleft() for _ in range(len(self._cancelled))}
        jobs = held()
        late = [job for job in jobs if job.deadline_s <= now_s]
        gone = [job for job in jobs if job.done in cancelled and job.deadline_s > now_s]
        self._soonest_s = min((job.deadline_s for job in jobs if job.deadline_s > now_s), default=math.inf)
        return Leaving(gone, late)
