"""The calls of one model that have begun and are not over.

On a CPU a call is over as soon as it has begun. On a GPU it has only been queued, and the host prepares the next ones
meanwhile (`prime_core.sampling.lookahead`): the device does not wait for the host between two calls.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from prime_core.sampling.lookahead import num_queued
from prime_core.sampling.step_parts import StepResult
from prime_core.sampling.stepper import AnyRow, QueuedCall
from server.engine.generation import Batch
from server.engine.stopwatch import CallStopwatch


class _Call(NamedTuple):
    batch: Batch
    queued: QueuedCall
    begun_s: float


class UnderWay:
    """Begins calls, and ends them in the same order."""

    def __init__(self, stopwatch: CallStopwatch) -> None:
        """Begin with none.

        Args:
            stopwatch: watches over the calls and times them.
        """
        self._stopwatch = stopwatch
        self._calls: deque[_Call] = deque()
        self._begun = False  # one since the last one ended

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, row: AnyRow) -> bool:
        """Return whether a row is in a call that is not over."""
        return any(row in call.queued.rows for call in self._calls)

    @property
    def oldest(self) -> Batch:
        """The rows of the call that `end` ends."""
        return self._calls[0].batch

    @property
    def enough(self) -> bool:
        """Whether the oldest call has to end before another begins."""
        return bool(self._calls) and len(self._calls) > num_queued(self.oldest.generation.stepper.device)

    def begin(self, batch: Batch) -> None:
        """Begin a call. If it raises, its rows have not moved."""
        begun_s = time.monotonic()
        with self._stopwatch.call(batch.num_tokens):
            queued = batch.generation.stepper.queue([entry.row for entry in batch.entries])
        self._calls.append(_Call(batch, queued, begun_s))
        self._begun = True

    def end(self) -> list[StepResult]:
        """Wait for the oldest call and return its results. If it raises, it is over too, and its rows have moved."""
        call = self._calls.popleft()
        try:
            with self._stopwatch.call(call.batch.num_tokens):
                results = call.queued.results()
        except Exception:
            self._stopwatch.raised()
            raise
        # Of calls that end one after the other, the device may have been done with all before the first was waited for.
        self._stopwatch.ended(call.begun_s, call.batch.num_tokens, telling=self._begun)
        self._begun = False
        return results
