"""The threads beside the engine's."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Executor, ThreadPoolExecutor

# All of it is short and mostly one-threaded; more threads would only compete with the engine.
PREPARE_THREADS = 2
ANSWER_THREADS = 2


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
        """Return the threads that prepare a model's requests: each has its own, so that a slow one delays no other."""
        return self._prepare[model]
