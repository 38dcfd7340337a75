"""What the rows of a request go through while they are sampled, from the engine's thread to a reader in the event loop.

A reader that is slow gets fewer and larger changes: what is held is the state of each row and which of its tokens
changed since the reader last looked, never a history. So a stream costs the engine a copy of a few digits a step, and
memory no more than the rows themselves.

Shapes: L tokens, S digits a token, P positions.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prime_core.sampling.row import Row
from prime_core.sampling.step_parts import StepResult


class RowChange(NamedTuple):
    """What happened to one row since its reader last looked.

    Attributes:
        output: number of the row in its request.
        y: (L, S) int64, all its digits now; b where masked.
        positions: (P,) int64, the tokens with a digit that is not what it was, in order.
        step: the step of the grid that it reached, from 0.
        nfe: denoiser calls it has taken part in.
    """

    output: int
    y: Tensor
    positions: Tensor
    step: int
    nfe: int


class Changes(NamedTuple):
    """What happened to a request since its reader last looked.

    Attributes:
        rows: the rows that changed.
        progress: calls done over calls needed, both summed over the rows: exact, 0 to 1.
        eta_s: seconds to the end at the pace so far; None before the first call has ended.
    """

    rows: list[RowChange]
    progress: float
    eta_s: float | None


class _Followed:
    """A row as its reader knows it."""

    def __init__(self, row: Row, mask_index: int) -> None:
        self.plan = row.plan
        self.y = row.y.cpu().numpy().copy()
        self.changed = np.zeros(len(self.y), dtype=np.bool_)
        self.nfe = 0
        self._mask_index = mask_index

    def follow(self, result: StepResult) -> None:
        """Repeat a step of the row; what was masked again comes first (`StepResult`)."""
        before = self.y.copy()
        self.y.reshape(-1)[result.remasked] = self._mask_index
        self.y[result.positions] = result.digits
        self.changed |= (self.y != before).any(-1)
        self.nfe += 1

    def take(self, output: int) -> RowChange:
        """Return what changed, and begin anew."""
        positions = torch.from_numpy(self.changed.nonzero()[0])
        self.changed[:] = False
        y = torch.from_numpy(self.y.copy())
        return RowChange(output, y, positions, int(self.plan.steps[self.nfe - 1]), self.nfe)


class Feed:
    """Hands the progress of one request's rows from the engine to one reader.

    `advanced` is called by the engine's thread, the rest in the event loop.
    """

    def __init__(self, rows: Sequence[Row], mask_index: int) -> None:
        """Follow rows from where they are now; needs a running event loop.

        Args:
            rows: the rows of one request, at t = 1.
            mask_index: b, of the model's codec.
        """
        self._rows = [_Followed(row, mask_index) for row in rows]
        self._num_calls = sum(row.plan.nfe for row in rows)
        self._lock = threading.Lock()
        self._told = False  # the reader has been woken, or is about to be, and has not looked yet
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def advanced(self, output: int, result: StepResult) -> None:
        """Note a step of one row. The engine's thread; never waits for the reader."""
        if not result.ok:
            return
        with self._lock:
            self._rows[output].follow(result)
            told, self._told = self._told, True
        # To wake the loop takes a system call, and then its thread takes the interpreter from this one.
        if told:
            return
        # A loop that has closed has no reader either.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.set)

    async def wait(self) -> None:
        """Wait until something has changed since the last `take`."""
        await self._news.wait()

    def take(self, started_s: float | None) -> Changes:
        """Return all changes since the last time.

        Args:
            started_s: `time.monotonic()` of the request's first call; None before it.
        """
        self._news.clear()
        with self._lock:
            self._told = False
            changed = [row.take(output) for output, row in enumerate(self._rows) if bool(row.changed.any())]
            done = [row.nfe for row in self._rows]
        return Changes(changed, self._progress(done), self._eta_s(done, started_s))

    def _progress(self, done: Sequence[int]) -> float:
        return sum(done) / self._num_calls if self._num_calls else 1.0

    def _eta_s(self, done: Sequence[int], started_s: float | None) -> float | None:
        """Seconds until the slowest row is finished, at the pace of the row that has gone furthest."""
        if started_s is None or not max(done, default=0):
            return None
        calls_left = max(row.plan.nfe - nfe for row, nfe in zip(self._rows, done, strict=True))
        return (time.monotonic() - started_s) / max(done) * calls_left
