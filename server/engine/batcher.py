"""Picks the rows of the next denoiser call. "Schedule" is the noise schedule; this is the batcher."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from prime_core.sampling.stepper import AnyRow
from server.engine.feed import Feed
from server.engine.memory import RowCap


@dataclass(eq=False, slots=True)
class Job:
    """The rows of one accepted request, on their way through the engine.

    Attributes:
        model: name of the model that takes its rows on.
        rows: one row per output, or some for each input that is scored; the engine takes them on.
        done: resolved when every row is finished; cancelling it frees the rows within a step.
        arrived_s: `time.monotonic()` when the request arrived, before its plans were drawn.
        submitted_s: when the engine took it on, its plans drawn.
        started_s: of its first denoiser call.
        finished_s: of its last.
        feed: follows the rows for a reader; None without one.
        deadline_s: `time.monotonic()` at which it is given up.
        num_bytes: memory of its rows, as the engine counts it while it holds them.
        counted: whether the metrics tell already what became of its request.
    """

    model: str
    rows: Sequence[AnyRow]
    arrived_s: float
    submitted_s: float | None = None
    started_s: float | None = None
    finished_s: float | None = None
    feed: Feed | None = None
    deadline_s: float = math.inf
    num_bytes: int = 0
    counted: bool = False
    done: Future[None] = field(default_factory=Future)

    @property
    def allowed_s(self) -> float:
        """Seconds from its arrival to the deadline."""
        return self.deadline_s - self.arrived_s

    @property
    def seconds_left(self) -> float:
        """Seconds to the deadline, at least 0."""
        return max(self.deadline_s - time.monotonic(), 0.0)


class Entry(NamedTuple):
    """A row that waits for its next denoiser call, or for the last results; its job, and its number there."""

    job: Job
    row: AnyRow
    output: int


class Batcher:
    """Takes turns over the jobs of one model, within two caps.

    The first rows of all jobs come in the order of arrival, then their second rows, and so on, as long as they
    fit; one that does not fit is passed over for this call only. So a job of many rows does not shut out one
    of few. The oldest row always fits, so it is in every call until it is finished, and then the next one is
    the oldest: nobody starves. Rows of one call need nothing in common.
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        """Set the caps.

        Args:
            max_rows: most rows of a call, at least 1.
            max_tokens: most tokens of a call (the sum of row lengths); no row may be longer.

        Raises:
            ValueError: if a cap is below 1.
        """
        if max_rows < 1 or max_tokens < 1:
            raise ValueError(f"max_rows ({max_rows}) and max_tokens ({max_tokens}) must be at least 1")
        self.cap = RowCap(max_rows)
        self.max_tokens = max_tokens
        # The rows of every job of which not all is known, the oldest job first.
        self._waiting: dict[Job, list[Entry]] = {}
        self._lengths: Counter[int] = Counter()  # of these rows

    def emptied(self) -> Batcher:
        """Return a batcher with the same caps and no rows; what it learns of memory, both know."""
        other = Batcher(self.cap.most, self.max_tokens)
        other.cap = self.cap
        return other

    @property
    def max_rows(self) -> int:
        """Most rows of the next call: fewer than were set after memory ran out."""
        return self.cap.now

    def __len__(self) -> int:
        return self._lengths.total()

    def add(self, job: Job) -> None:
        """Append the unfinished rows of a job.

        Raises:
            ValueError: if a row is longer than `max_tokens`.
        """
        longest = max((row.length for row in job.rows), default=0)
        if longest > self.max_tokens:
            raise ValueError(f"a row has {longest} tokens, but a call holds at most {self.max_tokens}")
        self._keep(job, _entries_of(job))

    def choose(self) -> list[Entry]:
        """Return the rows of the next call in turn; empty only if there are none that have an event left."""
        chosen: list[Entry] = []
        tokens, shortest = 0, min(self._lengths, default=0)
        for entry in _in_turn(self._waiting.values()):
            if len(chosen) == self.max_rows or tokens + shortest > self.max_tokens:
                break
            if tokens + entry.row.length <= self.max_tokens and not entry.row.done:
                chosen.append(entry)
                tokens += entry.row.length
        return chosen

    def jobs(self) -> list[Job]:
        """Return the jobs that have rows here, oldest first."""
        return list(self._waiting)

    def drop(self, jobs: Iterable[Job]) -> None:
        """Forget all rows of some jobs."""
        for job in jobs:
            self._keep(job, [])

    def drop_rows(self, entries: Iterable[Entry]) -> None:
        """Forget some rows, which are finished."""
        finished: dict[Job, set[int]] = {}
        for entry in entries:
            finished.setdefault(entry.job, set()).add(entry.output)
        for job, outputs in finished.items():
            self._keep(job, [entry for entry in self._waiting.get(job, ()) if entry.output not in outputs])

    def _keep(self, job: Job, entries: list[Entry]) -> None:
        """Keep these rows of a job, which has its place among the others, and no more of it."""
        self._lengths.subtract(entry.row.length for entry in self._waiting.get(job, ()))
        self._lengths.update(entry.row.length for entry in entries)
        self._lengths = +self._lengths
        if entries:
            self._waiting[job] = entries
        else:
            self._waiting.pop(job, None)


def _entries_of(job: Job) -> list[Entry]:
    """Return the unfinished rows of a job."""
    return [Entry(job, row, output) for output, row in enumerate(job.rows) if not row.done]


def _in_turn(waiting: Iterable[Sequence[Entry]]) -> Iterator[Entry]:
    """Yield the first entries of all jobs in their order, then the second entries, and so on.

    Args:
        waiting: the entries of every job, at least one each.
    """
    turn = 0
    while waiting:
        longer = []
        for entries in waiting:
            yield entries[turn]
            if len(entries) > turn + 1:
                longer.append(entries)
        waiting, turn = longer, turn + 1
