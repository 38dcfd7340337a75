"""The room for rows: how many the engine holds, of all models together, and the lock around its lists of jobs."""

from __future__ import annotations

import threading


class Room:
    """Counts rows that were accepted and are not finished.

    Attributes:
        max_rows: most rows held at once, waiting and running.
        max_bytes: most memory of them.
        lock: guards this count and every list of jobs; notified when there is something to do.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        """Start empty.

        Args:
            max_rows: at least 1.
            max_bytes: of all rows together.

        Raises:
            ValueError: if there is no room for a row.
        """
        if max_rows < 1:
            raise ValueError(f"max_queue_rows must be at least 1, got {max_rows}")
        self.max_rows, self.max_bytes = max_rows, max_bytes
        self.lock = threading.Condition()
        self._held = 0
        self._bytes = 0

    @property
    def held(self) -> int:
        """Rows that were accepted and are not finished."""
        return self._held

    def excess(self, num_rows: int) -> int:
        """Return how many rows must be finished before so many more fit; 0 or less if they fit now."""
        return self._held + num_rows - self.max_rows

    def take(self, num_rows: int) -> None:
        """Hold more rows."""
        with self.lock:
            self._held += num_rows

    def fill(self, num_bytes: int) -> bool:
        """Let rows that are held take memory; False if there is not so much, and nothing has changed."""
        with self.lock:
            if self._bytes + num_bytes > self.max_bytes:
                return False
            self._bytes += num_bytes
            return True

    def give_back(self, num_rows: int, num_bytes: int = 0) -> None:
        """Hold fewer rows, and the memory that they took."""
        with self.lock:
            self._held -= num_rows
            self._bytes -= num_bytes
