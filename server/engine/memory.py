"""Out of memory: how it is recognised, and how many rows a call may hold after it.

Rows are independent and do not move before a call is made, so one that runs out of memory is simply made again with
fewer rows: the noise, and with it the output, does not depend on who shares a call.
"""

from __future__ import annotations

import torch

PATIENCE_CALLS = 64  # full calls that must succeed before a call may be twice as large again
MAX_PATIENCE_CALLS = 4096
_WORDS = (
    "out of memory",  # CUDA's runtime
    "not enough memory",
    "can't allocate memory",  # torch's allocator on a CPU
    "cannot allocate memory",
    "status_alloc_failed",  # cuBLAS, cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of a call says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def free_cached_memory() -> None:
    """Give back what torch keeps in store: its pieces may be too small for what is asked."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class RowCap:
    """Most rows of a call: it halves when memory runs out, and doubles after a number of full calls.

    Each time that it had to halve again, it waits twice as long before it grows. Only one thread changes it.

    Attributes:
        most: the cap while memory lasts.
        now: the cap, 1 to ``most``.
    """

    def __init__(self, most: int) -> None:
        """Start at the top.

        Args:
            most: rows, at least 1.
        """
        self.most = most
        self.now = most
        self._patience = PATIENCE_CALLS
        self._full_calls = 0

    def halve(self, num_rows: int) -> None:
        """Note that a call over so many rows ran out of memory."""
        if self.now < self.most:  # it had halved before
            self._patience = min(2 * self._patience, MAX_PATIENCE_CALLS)
        self.now = max(num_rows // 2, 1)
        self._full_calls = 0

    def succeeded(self, num_rows: int) -> None:
        """Note that a call over so many rows succeeded."""
        if self.now == self.most or num_rows < self.now:
            return
        self._full_calls += 1
        if self._full_calls >= self._patience:
            self.now = min(2 * self.now, self.most)
            self._full_calls = 0
