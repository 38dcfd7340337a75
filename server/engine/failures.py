"""Why the engine does not take a request, or does not finish it. Nothing here knows HTTP."""

from __future__ import annotations


class EngineError(RuntimeError):
    """An accepted request failed."""


class MemoryFullError(RuntimeError):
    """A row did not fit in memory, even alone in its call."""


class DeadlineError(RuntimeError):
    """An accepted request was not finished in time."""


class UnavailableError(RuntimeError):
    """The engine takes no requests: it is draining or has died."""


class ModelFailedError(UnavailableError):
    """One model takes no requests: it failed again and again; the others go on."""


class QueueFullError(RuntimeError):
    """There is no room for the rows of a request; `retry_after_s` is when to expect some."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s
