"""The engine: one thread that steps the rows of all requests.

    admit -> choose rows -> one denoiser call, draws and reveals (`Stepper.step`) -> hand out events

Everything else here keeps that loop honest: it bounds what is held, and no failure of one call, one request
or one pass of the loop takes the others down.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from prime_core.checkpoint import Checkpoint
from prime_core.sample import NonFiniteError, prepare_rows
from prime_core.stepper import Row, Stepper, StepResult
from server.batcher import Batcher, Entry, Job
from server.failures import EngineError, QueueFullError, UnavailableError
from server.metrics import Metrics
from server.stopwatch import CallStopwatch

logger = logging.getLogger("prime.engine")

MAX_CRASHES = 3  # of the loop, in a row; then the engine ends
MAX_FAULTS = 3  # calls that raise, in a row; then the engine tries a request of its own
MAX_RETRY_AFTER_S = 3600
WARM_UP_TOKENS = 32

EngineState = Literal["warming up", "ready", "stalled", "draining", "stopped"]


class LoadedModel(NamedTuple):
    """A checkpoint and the name it is served under."""

    name: str
    checkpoint: Checkpoint


class Engine:
    """Runs the rows of all requests through one denoiser. Every public member may be used from any thread.

    Attributes:
        model: what is served.
        metrics: the metrics of this engine and of the app in front of it.
        batcher: picks the rows of a call; only the engine's thread changes it.
        max_queue_rows: most rows held at once, waiting and running.
    """

    def __init__(
        self, model: LoadedModel, batcher: Batcher, max_queue_rows: int, metrics: Metrics | None = None
    ) -> None:
        """Build the engine; `start` makes it run.

        Args:
            model: what to serve.
            batcher: picks the rows of a call; its `max_tokens` must hold the model's context.
            max_queue_rows: most rows held at once, at least 1.
            metrics: where to count; None for new metrics.

        Raises:
            ValueError: if a row as long as the context fits into no call, or there is no room for a row.
        """
        context = model.checkpoint.config.model.length
        if batcher.max_tokens < context:
            raise ValueError(
                f"max_batch_tokens ({batcher.max_tokens}) must be at least the model's context ({context})"
            )
        if max_queue_rows < 1:
            raise ValueError(f"max_queue_rows must be at least 1, got {max_queue_rows}")
        self.model = model
        self.max_queue_rows = max_queue_rows
        self.metrics = Metrics() if metrics is None else metrics
        self.metrics.watch(lambda: self._num_jobs()[0], lambda: self._num_jobs()[1])
        self._stepper = Stepper(model.checkpoint.denoiser, model.checkpoint.codec)
        self.batcher = batcher
        self._inbox: deque[Job] = deque()
        self._wake = threading.Condition()  # guards the inbox, the batcher's list and the counts below
        self._held_rows = 0
        self._draining = False
        self._stopping = False
        self._warm = False
        self._faults = 0  # denoiser calls that raised, in a row
        self._stopwatch = CallStopwatch()
        self.metrics.model_info.labels(model.name, self.dtype, self.device).set(1)
        self._thread = threading.Thread(target=self._run, name="prime-engine", daemon=True)

    # --- the loop -----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Take every chosen row to its next event; return whether there was any."""
        self._admit()
        batch = self.batcher.choose()
        if not batch:
            return False
        results = self._call(batch)
        if results is not None:
            self._hand_out(batch, results)
        return True

    def _admit(self) -> None:
        """Move new jobs to the batcher, and forget those whose callers have gone."""
        with self._wake:
            arrived = list(self._inbox)
            while self._inbox:
                self.batcher.add(self._inbox[0])
                self._inbox.popleft()  # only now: a job must always be somewhere, for `_fail_all` to find it
            gone = [job for job in self.batcher.jobs() if job.done.cancelled()]
        self._finish(gone)
        self._finish(job for job in arrived if all(row.done for row in job.rows))

    def _call(self, batch: Sequence[Entry]) -> list[StepResult] | None:
        """One denoiser call; if it raises, its callers fail at once and the result is None."""
        for entry in batch:
            if entry.job.started_s is None:
                entry.job.started_s = time.monotonic()
        try:
            results = self._step_rows([entry.row for entry in batch])
        except Exception as error:  # whatever a network raises belongs to the callers of this call
            logger.error("a denoiser call over %d rows failed", len(batch), exc_info=error)
            self._finish({entry.job for entry in batch}, EngineError("the denoiser failed"))
            self._faults += 1
            return None
        self._faults = 0
        return results

    def _step_rows(self, rows: Sequence[Row]) -> list[StepResult]:
        """The one way to the denoiser, under the stopwatch: a hang shows in `state` whoever made the call."""
        with self._stopwatch.call():
            results = self._stepper.step(rows)
        num_tokens = sum(row.length for row in rows)
        self.metrics.call_done(len(rows), num_tokens, self._stopwatch.last_s)
        return results

    def _hand_out(self, batch: Sequence[Entry], results: Sequence[StepResult]) -> None:
        """Resolve the jobs that are finished, and fail those with a row that has no finite logits."""
        touched = {entry.job for entry in batch}
        broken = {entry.job for entry, result in zip(batch, results, strict=True) if not result.ok}
        self._finish(broken, NonFiniteError("the denoiser gave no finite logits"))
        self._finish(job for job in touched - broken if all(row.done for row in job.rows))
        with self._wake:
            self.batcher.drop_finished()

    def _finish(self, jobs: Iterable[Job], error: Exception | None = None) -> None:
        """Give back the room of some jobs and resolve them, with an error if there is one."""
        finished = list(jobs)
        with self._wake:
            self.batcher.drop(finished)
            self._held_rows -= sum(len(job.rows) for job in finished)
        for job in finished:
            job.finished_s = time.monotonic()
            if not job.done.set_running_or_notify_cancel():
                continue
            if error is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(error)

    # --- the door -----------------------------------------------------------------------------------------

    def reserve(self, num_rows: int) -> None:
        """Take room for rows before any work is done for them; follow with `submit` or `release`.

        Raises:
            UnavailableError: if the engine is draining or has stopped.
            QueueFullError: if there is no room.
        """
        with self._wake:
            if self._draining or self._stopping:
                raise UnavailableError("the engine takes no new requests")
            excess = self._held_rows + num_rows - self.max_queue_rows
            if excess > 0:
                calls = self.batcher.calls_until_free(excess, self._inbox)
                seconds = calls * self._stopwatch.seconds_per_call
                raise QueueFullError(min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S))
            self._held_rows += num_rows

    def release(self, num_rows: int) -> None:
        """Give back reserved room that came to no submission."""
        with self._wake:
            self._held_rows -= num_rows

    def submit(self, job: Job) -> None:
        """Hand over a job whose rows have reserved room; `job.done` is resolved by the engine's thread.

        Raises:
            UnavailableError: if the engine has stopped; the room stays with the caller.
        """
        with self._wake:
            if self._stopping:
                raise UnavailableError("the engine has stopped")
            self._inbox.append(job)
            self._wake.notify_all()

    def drain(self) -> None:
        """Refuse new requests from now on; those that were accepted go on."""
        with self._wake:
            self._draining = True

    @property
    def device(self) -> str:
        """Where the denoiser runs."""
        return str(self._stepper.device)

    @property
    def dtype(self) -> str:
        """Number type of the weights: "float32" or "bfloat16"."""
        return str(self.model.checkpoint.dtype).removeprefix("torch.")

    @property
    def held_rows(self) -> int:
        """Rows that were accepted and are not finished."""
        return self._held_rows

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def state(self) -> EngineState:
        """What the engine is doing; only "ready" takes traffic."""
        if self._stopping or (self._warm and not self.alive):
            return "stopped"
        if self._draining:
            return "draining"
        if not self._warm:
            return "warming up"
        return "stalled" if self._stopwatch.stalled else "ready"

    def _num_jobs(self) -> tuple[int, int]:
        """Return the numbers of jobs that have run and that wait for their first call."""
        with self._wake:
            jobs = self.batcher.jobs()
            running = sum(job.started_s is not None for job in jobs)
            return running, len(jobs) - running + len(self._inbox)

    # --- the thread ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; it warms up with one real denoiser call."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after its current call; whoever still waits fails with `UnavailableError`."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._warm_up()
            self._loop()
        except Exception as error:  # the process ends on a dead engine; its log must say why
            logger.error("the engine has died", exc_info=error)
        finally:
            with self._wake:
                self._stopping = True
            self._fail_all(UnavailableError("the engine has stopped"))

    def _warm_up(self) -> None:
        """One real call, which allocates and compiles what the first request should not wait for."""
        checkpoint = self.model.checkpoint
        num_tokens = min(WARM_UP_TOKENS, checkpoint.config.model.length)
        rows = prepare_rows(checkpoint, n=1, steps=1, seed=0, max_tokens=num_tokens).rows
        if not all(result.ok for result in self._step_rows(rows)):
            raise RuntimeError("the model gives logits that are not finite")
        self._warm = True

    def _loop(self) -> None:
        crashes = 0
        while not self._stopping:
            if self._faults == MAX_FAULTS:
                self._warm_up()  # is it the requests, or the device? If this raises, the engine ends
                self._faults = 0
            try:
                if self.step():
                    crashes = 0
                else:
                    self._wait()
            except Exception as error:
                crashes += 1
                logger.error(
                    "the engine loop failed (%d of %d in a row)", crashes, MAX_CRASHES, exc_info=error
                )
                self._fail_all(EngineError("the engine failed"))
                if crashes == MAX_CRASHES:
                    raise

    def _wait(self) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._stopping)

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            jobs = dict.fromkeys([*self._inbox, *self.batcher.jobs()])
            self._inbox.clear()
        self._finish(jobs, error)
