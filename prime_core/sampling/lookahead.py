"""Calls that are queued on a GPU while it still computes the ones before.

What a row's next call is, its plan tells; the values that it needs are on the device. So the host need not wait for a
call before it prepares the next one, and the device does not wait for the host either, if to prepare a call takes less
time than to compute one. Only that a row has failed is known late: it may have taken part in calls in vain by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from prime_core.sampling.stepper import AnyRow, QueuedCall, Stepper

# One that the device computes, and one behind it. More would help no further.
NUM_QUEUED_ON_GPU = 2


class Lookahead:
    """Makes calls one after the other, and waits for the oldest when there are enough of them.

    On a CPU every call is over when it returns.
    """

    def __init__(self, stepper: Stepper) -> None:
        """Begin without calls."""
        self._stepper = stepper
        self._queued: deque[QueuedCall] = deque()
        self._most = num_queued(stepper.device)

    def __contains__(self, row: AnyRow) -> bool:
        """Return whether the row is in a call whose results are not there yet."""
        return any(row in call.rows for call in self._queued)

    def step(self, rows: Sequence[AnyRow]) -> None:
        """Advance rows by their next events; whether one has failed is known when it is in no call any more.

        Args:
            rows: as those of `Stepper.step`.
        """
        self._queued.append(self._stepper.queue(rows))
        self._wait(self._most)

    def finish(self) -> None:
        """Wait for all calls."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._queued) > most:
            self._queued.popleft().results()


def num_queued(device: torch.device) -> int:
    """Return how many calls may be queued while the next one is prepared."""
    return 0 if device.type == "cpu" else NUM_QUEUED_ON_GPU
