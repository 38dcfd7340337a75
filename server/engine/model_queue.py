"""One model inside the engine: its network, the rows that wait for it, and how its calls have gone.

The engine's thread calls, in this order: `admit`, `choose`, `call`, `hand_out`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from prime_core.checkpoint import Checkpoint
from prime_core.prepare import NonFiniteError, prepare_rows
from prime_core.stepper import AnyRow, Stepper, StepResult
from server.engine.batcher import Batcher, Entry, Job
from server.engine.departures import Departures
from server.engine.failures import DeadlineError, EngineError, MemoryFullError
from server.engine.memory import free_cached_memory, is_out_of_memory
from server.engine.room import Room
from server.engine.stopwatch import CallStopwatch
from server.metrics import Metrics

logger = logging.getLogger("prime.engine")

WARM_UP_TOKENS = 32

Kind = Literal["text", "images"]


class LoadedModel(NamedTuple):
    """A checkpoint and the name it is served under."""

    name: str
    checkpoint: Checkpoint


def try_model(model: LoadedModel) -> None:
    """Make one real call of a model that does not serve yet, in the calling thread.

    Raises:
        NonFiniteError: if the logits are not finite.
    """
    rows = _trial_rows(model.checkpoint)
    _check_finite(model.name, Stepper(model.checkpoint.denoiser, model.checkpoint.codec).step(rows))


def _trial_rows(checkpoint: Checkpoint) -> Sequence[AnyRow]:
    config = checkpoint.config.model
    fields: dict[str, Any] = (
        {} if config.kind == "unet" else {"max_tokens": min(WARM_UP_TOKENS, config.length)}
    )
    return prepare_rows(checkpoint, n=1, steps=1, seed=0, **fields).rows


def _check_finite(name: str, results: Sequence[StepResult]) -> None:
    if not all(result.ok for result in results):
        raise NonFiniteError(
            f"model {name!r} gives logits that are not finite, so its weights are not sound: leave it out, or "
            "load another checkpoint of it"
        )


class ModelQueue:
    """What the engine holds for one model.

    Attributes:
        name: in requests and answers.
        checkpoint: what is served.
        kind: what it makes: "text" or "images".
        batcher: picks the rows of a call; only the engine's thread changes it.
        inbox: jobs that were submitted and are not in the batcher yet.
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
        self.name, self.checkpoint = model
        context = self.checkpoint.config.model.length
        if batcher.max_tokens < context:
            raise ValueError(
                f"max_batch_tokens ({batcher.max_tokens}) must be at least the context of model "
                f"{self.name!r} ({context})"
            )
        self.kind: Kind = "images" if self.checkpoint.config.model.kind == "unet" else "text"
        self.batcher = batcher
        self.inbox: deque[Job] = deque()
        self.stopwatch = CallStopwatch()
        self.faults = 0
        self.crashes = 0
        self.failed = False
        self._departures = Departures()
        self._room = room
        self._stepper = Stepper(self.checkpoint.denoiser, self.checkpoint.codec)
        self._next: Checkpoint | None = None
        self._metrics = metrics
        metrics.add_model(self.name, self.kind, self.dtype, self.device, self._num_jobs)

    def put(self, job: Job) -> None:
        """Take a job on; whoever calls holds the room's lock."""
        self._departures.watch(job)
        self.inbox.append(job)

    # --- the turn of a model ------------------------------------------------------------------------------

    def admit(self) -> None:
        """Move new jobs to the batcher, and forget those whose callers have gone or whose time is over.

        While new weights wait for the rows that began with the old ones, new jobs wait too.
        """
        with self._room.lock:
            if self._next is not None and not len(self.batcher):
                self._take_next(self._next)
            arrived = list(self.inbox) if self._next is None else []
            for job in arrived:
                self.batcher.add(job)
                self.inbox.popleft()  # only now: a job must always be somewhere, for `fail_all` to find it
            leaving = self._departures.take(self._jobs)
        self._finish(leaving.gone)
        self._finish(leaving.late, DeadlineError("the deadline has passed"))
        self._finish(job for job in arrived if all(row.done for row in job.rows))

    def choose(self) -> list[Entry]:
        """Return the rows of the next call."""
        return self.batcher.choose()

    def call(self, batch: Sequence[Entry]) -> list[StepResult] | None:
        """One denoiser call; if it raises, the result is None, and its callers fail at once.

        But one that runs out of memory is made again by the turns that follow, with half the rows.
        """
        now_s = time.monotonic()
        for entry in batch:
            if entry.job.started_s is None:
                entry.job.started_s = now_s
        try:
            results = self._step([entry.row for entry in batch])
        except Exception as error:  # whatever a network raises belongs to the callers of this call
            if is_out_of_memory(error):
                self._out_of_memory(batch)
                return None
            logger.error("a call of model %r over %d rows failed", self.name, len(batch), exc_info=error)
            self._finish({entry.job for entry in batch}, EngineError("the denoiser failed"))
            self.faults += 1
            return None
        self.faults = 0
        self.batcher.cap.succeeded(len(batch))
        return results

    def _out_of_memory(self, batch: Sequence[Entry]) -> None:
        """Halve the next calls; a row that was alone fails with its request."""
        logger.warning("a call of model %r over %d rows ran out of memory", self.name, len(batch))
        self._metrics.out_of_memory.labels(self.name).inc()
        self.batcher.cap.halve(len(batch))
        free_cached_memory()
        if len(batch) == 1:
            self._finish([batch[0].job], MemoryFullError("a row does not fit in memory"))

    def hand_out(self, batch: Sequence[Entry], results: Sequence[StepResult]) -> None:
        """Tell who follows, resolve the jobs that are finished, fail those with a row without finite logits."""
        for entry, result in zip(batch, results, strict=True):
            if entry.job.feed is not None:
                entry.job.feed.advanced(entry.output, result)
        touched = {entry.job for entry in batch}
        broken = {entry.job for entry, result in zip(batch, results, strict=True) if not result.ok}
        self._finish(broken, NonFiniteError("the denoiser gave no finite logits"))
        self._finish(job for job in touched - broken if all(row.done for row in job.rows))
        with self._room.lock:
            self.batcher.drop_finished(touched)
        self.crashes = 0

    def warm_up(self) -> None:
        """One real call, which allocates and compiles what the first request should not wait for.

        Raises:
            NonFiniteError: if the logits are not finite.
        """
        _check_finite(self.name, self._step(_trial_rows(self.checkpoint)))

    def replace(self, checkpoint: Checkpoint) -> None:
        """Serve other weights of the same model, as soon as no row that began with the old ones is left.

        Args:
            checkpoint: differs in its weights only, and was tried (`try_model`).
        """
        with self._room.lock:
            self._next = checkpoint

    def _take_next(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._next = checkpoint, None
        self._stepper = Stepper(checkpoint.denoiser, checkpoint.codec)
        free_cached_memory()

    def _step(self, rows: Sequence[AnyRow]) -> list[StepResult]:
        """The one way to the denoiser, under the stopwatch: a hang shows in `Engine.state` whoever made the call."""
        with self.stopwatch.call():
            results = self._stepper.step(rows)
        lengths = [row.length for row in rows]
        num_filling = sum(self.checkpoint.denoiser.fill(lengths))
        self._metrics.call_done(self.name, len(rows), sum(lengths), num_filling, self.stopwatch.last_s)
        return results

    def _finish(self, jobs: Iterable[Job], error: Exception | None = None) -> None:
        """Give back the room of some jobs and resolve them, with an error if there is one."""
        finished = list(jobs)
        if not finished:
            return
        with self._room.lock:
            self.batcher.drop(finished)
            for job in finished:
                if job in self.inbox:
                    self.inbox.remove(job)
            self._room.give_back(sum(len(job.rows) for job in finished))
        for job in finished:
            job.finished_s = time.monotonic()
            if not job.done.set_running_or_notify_cancel():
                continue
            if error is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(error)

    # --- what the engine asks -----------------------------------------------------------------------------

    def fail_all(self, error: Exception, *, for_good: bool = False) -> None:
        """Fail every job of the model; with ``for_good`` it takes no more of them."""
        with self._room.lock:
            self.failed = self.failed or for_good
            jobs = self._jobs()
            self.inbox.clear()
        self._finish(jobs, error)

    def seconds_until_free(self, num_rows: int) -> float:
        """Return about how long the model's calls alone take until `num_rows` of its rows are finished."""
        with self._room.lock:
            calls = self.batcher.calls_until_free(num_rows, self.inbox)
        return calls * self.stopwatch.seconds_per_call

    def least_seconds(self, rows: Iterable[AnyRow]) -> float:
        """Return how long some rows take at least: their calls, alone, each as fast as the fastest there was."""
        return max((row.remaining for row in rows), default=0) * self.stopwatch.fastest_s

    @property
    def num_rows(self) -> int:
        """Rows that were submitted and are not finished."""
        with self._room.lock:
            return len(self.batcher) + sum(len(job.rows) for job in self.inbox)

    @property
    def device(self) -> str:
        """Where the denoiser runs."""
        return str(self._stepper.device)

    @property
    def dtype(self) -> str:
        """Number type of the weights: "float32" or "bfloat16"."""
        return str(self.checkpoint.dtype).removeprefix("torch.")

    def _jobs(self) -> list[Job]:
        return list(dict.fromkeys([*self.batcher.jobs(), *self.inbox]))

    def _num_jobs(self) -> tuple[int, int]:
        """Return the numbers of jobs that have run and that wait for their first call."""
        with self._room.lock:
            jobs = self._jobs()
            running = sum(job.started_s is not None for job in jobs)
            return running, len(jobs) - running
