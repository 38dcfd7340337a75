"""One model inside the engine: its network, the rows that wait for it, and how its calls have gone.

The engine's thread calls `admit` and, when it is the model's turn, `advance`: `choose`, `begin`, `end`, `hand_out`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.prepare import NonFiniteError
from prime_core.sampling.step_parts import StepResult
from prime_core.sampling.stepper import AnyRow
from server.engine.batcher import Batcher, Entry, Job
from server.engine.departures import Departures
from server.engine.failures import DeadlineError, EngineError, MemoryFullError
from server.engine.forecast import Release, RowSize, release_of, releases
from server.engine.generation import Batch, Generation, Generations
from server.engine.memory import free_cached_memory, is_out_of_memory
from server.engine.room import Room
from server.engine.stopwatch import CallStopwatch
from server.engine.under_way import UnderWay
from server.engine.warm_up import check_finite, trial_calls
from server.metrics import Metrics

logger = logging.getLogger("prime.engine")

Kind = Literal["text", "images"]


class LoadedModel(NamedTuple):
    """A checkpoint and the name it is served under."""

    name: str
    checkpoint: Checkpoint


class ModelQueue:
    """What the engine holds for one model.

    Attributes:
        name: in requests and answers.
        kind: what it makes: "text" or "images".
        inbox: jobs that were submitted and are not in the batcher yet.
        num_coming: rows that have room and are still to be submitted.
        stopwatch: times the calls.
        faults: calls that raised, in a row.
        crashes: turns that raised outside a call, in a row.
        failed: the model is out of service until the process starts again.
    """

    def __init__(self, model: LoadedModel, batcher: Batcher, room: Room, metrics: Metrics) -> None:
        """Put a queue in front of a model.

        Args:
            model: what to serve.
            batcher: of this model alone; its `max_tokens` must hold the model's context.
            room: where its rows are counted, and the lock around its lists.
            metrics: where to count.

        Raises:
            ValueError: if a row as long as the context fits into no call.
        """
        self.name, checkpoint = model
        self._generations = Generations(checkpoint, batcher)
        context = self.checkpoint.config.model.length
        if batcher.max_tokens < context:
            raise ValueError(
                f"max_batch_tokens ({batcher.max_tokens}) must be at least the context of model "
                f"{self.name!r} ({context})"
            )
        self.kind: Kind = "images" if self.checkpoint.config.model.kind == "unet" else "text"
        self.inbox: deque[Job] = deque()
        self.num_coming = 0
        self.stopwatch = CallStopwatch()
        self.faults = 0
        self.crashes = 0
        self.failed = False
        self._under_way = UnderWay(self.stopwatch)
        self._departures = Departures()
        self._row_size = RowSize()  # running mean over the jobs that came
        self._forecast: list[Release] | None = None
        self._room = room
        self._metrics = metrics
        metrics.add_model(self.name, self.kind, self.dtype, self.device, self._num_jobs)

    def put(self, job: Job) -> None:
        """Take a job on; whoever calls holds the room's lock."""
        job.submitted_s = time.monotonic()
        self._departures.watch(job)
        self.inbox.append(job)
        self._forecast = None
        self._row_size = self._row_size.moved_towards(job.rows)

    # --- the turn of a model ------------------------------------------------------------------------------

    def admit(self) -> None:
        """Move new jobs to the batcher, and forget those whose callers have gone or whose time is over."""
        if not (self.has_news or self._departures.due):  # as before most steps
            return
        while self._generations.renewable and self.num_under_way:
            self.end()  # or they would hold weights that are let go of
        with self._room.lock:
            let_go = self._generations.renew()
            arrived = list(self.inbox)
            for job in arrived:
                self.batcher.add(job)
                self.inbox.popleft()  # only now: a job must always be somewhere, for `fail_all` to find it
            leaving = self._departures.take(self._jobs)
        if let_go:
            free_cached_memory()  # waits for the device, so others must not wait for it
        self._finish(leaving.gone)
        self._finish(leaving.late, DeadlineError("the deadline has passed"))
        self._finish(job for job in arrived if all(row.done for row in job.rows))

    def advance(self) -> None:
        """Take the rows of the next call to their next events, and hand out what has come of the oldest one."""
        batch = self.choose()
        assert batch.entries or self.num_under_way, "rows are held that no call will finish"
        began = bool(batch.entries) and self.begin(batch)
        if self.num_under_way and (self._under_way.enough or not began):
            self.end()

    def choose(self) -> Batch:
        """Return the rows of the next call; none if all that is left is to wait for calls."""
        return self._generations.choose()

    def begin(self, batch: Batch) -> bool:
        """Begin one denoiser call; if it raises, which False tells, its callers fail at once.

        But one that runs out of memory is made again by the turns that follow, with half the rows.
        """
        now_s = time.monotonic()
        for entry in batch.entries:
            if entry.job.started_s is None:
                entry.job.started_s = now_s
        try:
            self._under_way.begin(batch)
            return True
        except Exception as error:  # noqa: BLE001  # whatever a network raises belongs to the callers of this call
            if not is_out_of_memory(error):
                self._fail(batch.entries, error)
                return False
        # Only here, where the error is gone: its traceback holds what the call had allocated.
        self._out_of_memory(batch.entries)
        return False

    def end(self) -> None:
        """Wait for the oldest call that is under way, and hand it out; if it raises, its callers fail."""
        batch = self._under_way.oldest
        try:
            results = self._under_way.end()
        except Exception as error:  # noqa: BLE001  # its rows have moved: it cannot be made again
            self._fail(batch.entries, error)
            return
        self._count(batch.generation, [entry.row.length for entry in batch.entries])
        self.faults = 0
        self.batcher.cap.succeeded(len(batch.entries))
        self.hand_out(batch, results)

    def _fail(self, entries: Sequence[Entry], error: Exception) -> None:
        """Fail the callers of a call that raised."""
        logger.error("a call of model %r over %d rows failed", self.name, len(entries), exc_info=error)
        jobs = {entry.job for entry in entries if entry.job.finished_s is None}
        self._finish(jobs, EngineError("the denoiser failed"))
        self.faults += 1

    def _out_of_memory(self, entries: Sequence[Entry]) -> None:
        """Halve the next calls; a row that was alone fails with its request."""
        logger.warning("a call of model %r over %d rows ran out of memory", self.name, len(entries))
        self._metrics.out_of_memory.labels(self.name).inc()
        self.batcher.cap.halve(len(entries))
        free_cached_memory()
        if len(entries) == 1:
            self._finish([entries[0].job], MemoryFullError("a row does not fit in memory"))

    def hand_out(self, batch: Batch, results: Sequence[StepResult]) -> None:
        """Tell who follows, resolve the jobs that are finished, fail those with a row without finite logits."""
        held = [  # others have left while the call was under way
            (entry, result)
            for entry, result in zip(batch.entries, results, strict=True)
            if entry.job.finished_s is None
        ]
        for entry, result in held:
            if entry.job.feed is not None:
                entry.job.feed.advanced(entry.output, result)
        self._forecast = None
        over = [entry for entry, _ in held if self._is_over(entry.row)]
        if over:
            with self._room.lock:
                batch.generation.batcher.drop_rows(over)
        broken = {entry.job for entry, result in held if not result.ok}
        self._finish(broken, NonFiniteError("the denoiser gave no finite logits"))
        jobs = {entry.job for entry in over} - broken
        self._finish(job for job in jobs if all(self._is_over(row) for row in job.rows))
        self.crashes = 0

    def _is_over(self, row: AnyRow) -> bool:
        """Whether a row is done, and all is known of it."""
        return row.done and row not in self._under_way

    def warm_up(self) -> None:
        """Make the real calls that allocate and compile what the first requests should not wait for.

        Raises:
            NonFiniteError: if the logits are not finite.
        """
        generation = self._generations.current
        for rows in trial_calls(generation.checkpoint, generation.stepper.device):
            check_finite(self.name, self._step(generation, rows))
        self.stopwatch.end_trials()

    def replace(self, checkpoint: Checkpoint) -> None:
        """Serve other weights of the same model from the next request on (`Generations`).

        Args:
            checkpoint: differs in its weights only, and was tried (`try_checkpoint`).
        """
        with self._room.lock:
            self._generations.replace(checkpoint)
            self._room.lock.notify_all()  # an idle engine lets go of the old ones at once

    def _step(self, generation: Generation, rows: Sequence[AnyRow]) -> list[StepResult]:
        """Make a call of our own."""
        begun_s, lengths = time.monotonic(), [row.length for row in rows]
        with self.stopwatch.call(sum(lengths)):
            results = generation.stepper.step(rows)
        self.stopwatch.ended(begun_s, sum(lengths))
        self._count(generation, lengths)
        return results

    def _count(self, generation: Generation, lengths: Sequence[int]) -> None:
        """Tell the metrics of the call that has just ended."""
        num_filling = sum(generation.checkpoint.denoiser.fill(lengths))
        self._metrics.call_done(self.name, len(lengths), sum(lengths), num_filling, self.stopwatch.last_s)

    def _finish(self, jobs: Iterable[Job], error: Exception | None = None) -> None:
        """Give back the room of some jobs and resolve them, with an error if there is one."""
        finished = list(jobs)
        if not finished:
            return
        with self._room.lock:
            self._forecast = None
            for generation in self._generations:
                generation.batcher.drop(finished)
            self._room.give_back(
                sum(len(job.rows) for job in finished), sum(job.num_bytes for job in finished)
            )
        for job in finished:
            job.finished_s = time.monotonic()
            if not job.done.set_running_or_notify_cancel():
                continue
            if error is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(copy.copy(error))  # each caller adds its own traceback

    # --- what the engine asks -----------------------------------------------------------------------------

    def fail_all(self, error: Exception, *, for_good: bool = False) -> None:
        """Fail every job of the model; with ``for_good`` it takes no more of them."""
        with self._room.lock:
            self.failed = self.failed or for_good
            jobs = self._jobs()
            self.inbox.clear()
        self._finish(jobs, error)

    def seconds_until_free(self, num_rows: int) -> float:
        """Return about how long the model's calls alone take until so many of its rows have come free."""
        with self._room.lock:
            forecast = self._forecast  # which `hand_out` takes away without the lock
            if forecast is None:  # as it is until the next call: refusals come by the thousand
                rows = [job.rows for job in self._jobs()]
                forecast = self._forecast = releases(rows, self.batcher.max_rows, self.batcher.max_tokens)
            release = release_of(forecast, num_rows)
        return self.stopwatch.cost.seconds(release.num_calls, release.num_tokens)

    def seconds_left(self) -> list[tuple[float, int]]:
        """Return how long each job has until its deadline, and the number of its rows."""
        with self._room.lock:
            return [(job.seconds_left, len(job.rows)) for job in self._jobs()]

    @property
    def seconds_per_row(self) -> float:
        """About how long a row takes when its calls are full, by those that came before."""
        num_calls, num_tokens = self._row_size
        return self.stopwatch.cost.seconds(num_calls / self.batcher.max_rows, num_tokens)

    def least_seconds(self, rows: Iterable[AnyRow]) -> float:
        """Return how long some rows take at least: their calls, alone, each as fast as the fastest there was."""
        return max((row.remaining for row in rows), default=0) * self.stopwatch.fastest_s

    @property
    def num_rows(self) -> int:
        """Rows of the jobs that were submitted and are not finished: what they hold of the room."""
        with self._room.lock:
            return sum(len(job.rows) for job in self._jobs())

    @property
    def num_under_way(self) -> int:
        """Calls that have begun and are not over."""
        return len(self._under_way)

    @property
    def has_rows(self) -> bool:
        """Whether there is something to call the denoiser for, or to wait for."""
        return self.num_under_way > 0 or any(len(generation.batcher) for generation in self._generations)

    @property
    def has_news(self) -> bool:
        """Whether there are new jobs or weights, for which an idle engine must wake."""
        return bool(self.inbox) or self._generations.renewable

    @property
    def checkpoint(self) -> Checkpoint:
        """What is served to new requests."""
        return self._generations.current.checkpoint

    @property
    def batcher(self) -> Batcher:
        """Holds the rows of new requests."""
        return self._generations.current.batcher

    @property
    def device(self) -> str:
        """Where the denoiser runs."""
        return str(self._generations.current.stepper.device)

    @property
    def dtype(self) -> str:
        """Number type of the weights: "float32" or "bfloat16"."""
        return self.checkpoint.dtype_name

    def _jobs(self) -> list[Job]:
        held = [job for generation in self._generations for job in generation.batcher.jobs()]
        return list(dict.fromkeys([*held, *self.inbox]))

    def _num_jobs(self) -> tuple[int, int]:
        """Return the numbers of jobs that have run and that wait for their first call."""
        with self._room.lock:
            jobs = self._jobs()
            running = sum(job.started_s is not None for job in jobs)
            return running, len(jobs) - running
