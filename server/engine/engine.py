"""The engine: one thread that steps the rows of all requests, of all models.

    admit -> whose turn -> choose rows -> one denoiser call, draws and reveals (`Stepper.queue`) -> its results, or on a
    GPU those of the call before -> hand out events

Everything else here keeps that loop honest: it bounds what is held, and no failure of one call, one request, one
turn or one model takes the others down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from prime_core.sampling.prepare import NonFiniteError
from server.engine.batcher import Batcher, Job
from server.engine.failures import EngineError, ModelFailedError, UnavailableError
from server.engine.memory import is_out_of_memory
from server.engine.model_queue import LoadedModel, ModelQueue
from server.engine.retry import queue_full
from server.engine.room import Room
from server.engine.stopwatch import Pulse
from server.engine.turns import Turns
from server.metrics import Metrics

logger = logging.getLogger("prime.engine")

MAX_CRASHES = 3  # turns of a model that raise outside its calls, in a row; then it is out of service
MAX_FAULTS = 3  # calls of a model that raise, in a row; then the engine tries a request of its own
WARM_UP_LIMIT_S = 600.0  # compiling for a GPU takes minutes

EngineState = Literal["warming up", "ready", "stalled", "draining", "stopped"]


class Engine:
    """Runs the rows of all requests.

    Every public member may be used from any thread but `step`, which is for the engine's own.

    Attributes:
        queues: the loaded models by name, in the order they were given.
        metrics: the metrics of this engine and of the app in front of it.
        max_batch_rows: most rows of a denoiser call.
        max_batch_tokens: most tokens of a denoiser call.
        max_queue_rows: most rows held at once, waiting and running, of all models together.
        max_queue_bytes: most memory of these rows.
    """

    def __init__(
        self,
        models: Sequence[LoadedModel],
        *,
        max_batch_rows: int,
        max_batch_tokens: int,
        max_queue_rows: int,
        max_queue_bytes: int = 2**30,
        metrics: Metrics | None = None,
    ) -> None:
        """Build the engine; `start` makes it run.

        Args:
            models: what to serve, at least one, each with a name of its own.
            max_batch_rows: most rows of a denoiser call, at least 1.
            max_batch_tokens: most tokens of a denoiser call; it must hold every model's context.
            max_queue_rows: most rows held at once, at least 1.
            max_queue_bytes: most memory of these rows: digits and plans.
            metrics: where to count; None for new metrics.

        Raises:
            ValueError: if a row as long as a context fits into no call, there is no room for a row, or there is
                no model or two of one name.
        """
        names = [model.name for model in models]
        if not names or len(set(names)) < len(names):
            raise ValueError("models must be at least one, each with a name of its own")
        self.metrics = Metrics() if metrics is None else metrics
        self.max_batch_rows, self.max_batch_tokens = max_batch_rows, max_batch_tokens
        self.max_queue_rows = max_queue_rows
        self.max_queue_bytes = max_queue_bytes
        self._room = Room(max_queue_rows, max_queue_bytes)
        self.queues: Mapping[str, ModelQueue] = MappingProxyType(
            {
                model.name: ModelQueue(
                    model, Batcher(max_batch_rows, max_batch_tokens), self._room, self.metrics
                )
                for model in models
            }
        )
        self._turns = Turns(names)
        self._pulse = Pulse()
        self._wake = self._room.lock
        self._draining = False
        self._stopping = False
        self._abandoned = False
        self._warm = False
        self._started_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="prime-engine", daemon=True)

    # --- the loop -----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Take the chosen rows of the model whose turn it is to their next event; return whether there were any.

        If calls of another model are under way, the step is to end one of them.
        """
        for queue in self.queues.values():
            self._isolated(queue, queue.admit)
        turn = self._turns.choose(name for name, queue in self.queues.items() if queue.has_rows)
        if turn is None:
            return False
        queue = self.queues[turn]
        work = queue.advance
        for other in self.queues.values():
            if other is not queue and other.num_under_way:
                # All models share one device: a call behind those of another would be charged with their time.
                queue, work = other, other.end
        started_s = time.monotonic()
        self._isolated(queue, work)
        self._turns.charge(queue.name, time.monotonic() - started_s)
        return True

    def _isolated(self, queue: ModelQueue, work: Callable[[], None]) -> None:
        """What goes wrong in some work stays with the jobs of one model; again and again, and it is given up."""
        try:
            work()
        except Exception as error:
            queue.crashes += 1
            logger.error(
                "a turn of model %r failed (%d of %d in a row)",
                queue.name,
                queue.crashes,
                MAX_CRASHES,
                exc_info=error,
            )
            queue.fail_all(EngineError("the engine failed"))
            if queue.crashes == MAX_CRASHES:
                self._give_up(queue)
        if queue.faults == MAX_FAULTS:
            self._probe(queue)

    def _probe(self, queue: ModelQueue) -> None:
        """Try a request of our own: is it the requests that make calls raise, or the model?"""
        try:
            queue.warm_up()
        except Exception as error:
            logger.error("model %r fails on a request of our own", queue.name, exc_info=error)
            if not is_out_of_memory(error):  # memory may come back
                self._give_up(queue)
        queue.faults = 0

    def _give_up(self, queue: ModelQueue) -> None:
        """Take a model out of service; the thread ends with the last one."""
        logger.error("model %r is out of service until the server is started again", queue.name)
        self.metrics.model_up.labels(queue.name).set(0)
        queue.fail_all(ModelFailedError("the model has failed"), for_good=True)

    # --- the door -----------------------------------------------------------------------------------------

    def reserve(self, model: str, num_rows: int) -> None:
        """Take room for rows before any work is done for them; follow with `submit` or `release`.

        Args:
            model: name of a loaded model.
            num_rows: how many.

        Raises:
            UnavailableError: if the engine is draining or has stopped.
            ModelFailedError: if the model is out of service.
            QueueFullError: if there is no room.
        """
        with self._wake:
            if self._draining or self._stopping:
                raise UnavailableError("the engine takes no new requests")
            if self.queues[model].failed:
                raise ModelFailedError("the model has failed")
            excess = self._room.excess(num_rows)
            if excess > 0:
                raise queue_full(self.queues.values(), excess)
            self._room.take(num_rows)
            self.queues[model].num_coming += num_rows

    def release(self, model: str, num_rows: int) -> None:
        """Give back reserved room that came to no submission."""
        with self._wake:
            self.queues[model].num_coming -= num_rows
            self._room.give_back(num_rows)

    def submit(self, job: Job) -> None:
        """Hand over a job whose rows have reserved room; `job.done` is resolved by the engine's thread.

        Raises:
            UnavailableError: if the engine has stopped; the room stays with the caller.
            ModelFailedError: if the job's model is out of service; the same.
            QueueFullError: if there is not so much memory for rows; the same.
        """
        with self._wake:
            if self._stopping:
                raise UnavailableError("the engine has stopped")
            queue = self.queues[job.model]
            if queue.failed:
                raise ModelFailedError("the model has failed")
            num_bytes = sum(row.num_bytes for row in job.rows)
            if not self._room.fill(num_bytes):
                raise queue_full(self.queues.values(), len(job.rows))
            job.num_bytes = num_bytes
            queue.num_coming -= len(job.rows)
            queue.put(job)
            self._wake.notify_all()

    def drain(self) -> None:
        """Refuse new requests from now on; those that were accepted go on."""
        with self._wake:
            self._draining = True

    @property
    def held_rows(self) -> int:
        """Rows that were accepted and are not finished."""
        return self._room.held

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def state(self) -> EngineState:
        """What the engine is doing; only "ready" takes traffic."""
        if self._stopping:  # as the thread does when it ends, however it ends
            return "stopped"
        if self._draining:
            return "draining"
        if not self._warm:
            return "warming up"
        return "stalled" if self.stalled else "ready"

    @property
    def stalled(self) -> bool:
        """Whether something takes far longer than it should: a call, the rest of a turn, or the warm-up."""
        if not self._warm:
            started_s = self._started_s
            return started_s is not None and time.monotonic() - started_s > WARM_UP_LIMIT_S
        watches = [queue.stopwatch for queue in self.queues.values()]
        longest_s = max(watch.limit_s for watch in watches)
        return any(watch.stalled for watch in watches) or self._pulse.seconds > longest_s

    # --- the thread ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; it warms up with one real denoiser call of each model."""
        self._started_s = time.monotonic()
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after its current call; whoever still waits fails with `UnavailableError`."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive() and not self._abandoned:
            self._thread.join(timeout_s)

    def abandon(self) -> None:
        """Fail whoever waits for a thread that hangs, before the process ends; nothing may be asked of it later."""
        with self._wake:
            self._stopping = self._abandoned = True
        for queue in self.queues.values():
            queue.fail_all(UnavailableError("the engine hangs"), for_good=True)

    def _run(self) -> None:
        try:
            for queue in self.queues.values():
                queue.warm_up()  # a model that cannot even start ends the process: that is a wrong deployment
            self._warm = True
            while not self._stopping:
                with self._pulse:
                    busy = self.step()
                if busy:
                    continue
                if all(queue.failed for queue in self.queues.values()):
                    raise RuntimeError("no model is left in service")
                self._wait()
        except NonFiniteError as error:  # only the warm-up raises it: the rows of a call fail each by itself
            logger.error("cannot start: %s", error)
        except Exception as error:  # the process ends on a dead engine; its log must say why
            logger.error("the engine has died", exc_info=error)
        finally:
            with self._wake:
                self._stopping = True
            for queue in self.queues.values():
                queue.fail_all(UnavailableError("the engine has stopped"))

    def _wait(self) -> None:
        with self._wake:
            self._wake.wait_for(
                lambda: self._stopping or any(queue.has_news for queue in self.queues.values())
            )
