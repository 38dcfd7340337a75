"""What a reader of a stream is told: all that happened, and no more often than it looks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.prepare import prepare_rows
from prime_core.sampling.row import Row
from prime_core.sampling.step_parts import StepResult
from server.engine.feed import Feed


def revealed(position: int) -> StepResult:
    """A step that reveals a token."""
    nothing = np.zeros(0, dtype=np.int64)
    return StepResult(np.array([position]), np.zeros((1, 2), dtype=np.int64), True, nothing)


def test_a_reader_is_woken_once_for_all_that_happens_until_it_looks(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(model_path)
    rows = [
        row
        for row in prepare_rows(checkpoint, n=3, max_tokens=4, steps=8, seed=0).rows
        if isinstance(row, Row)
    ]

    async def follow() -> None:
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe

        def noted(callback: Any, *arguments: Any) -> Any:
            woken.append(callback)
            return wake(callback, *arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", noted)
        feed = Feed(rows, checkpoint.codec.mask_index)
        for time in range(1, 4):
            for output in range(3):
                await asyncio.to_thread(feed.advanced, output, revealed(time))
            mine = [callback for callback in woken if getattr(callback, "__self__", None) is feed._news]
            assert len(mine) == time
            await asyncio.wait_for(feed.wait(), 10)
            changes = feed.take(None)
            assert [(row.output, row.positions.tolist(), row.nfe) for row in changes.rows] == [
                (output, [time], time) for output in range(3)
            ]
            assert feed.take(None).rows == []

    asyncio.run(follow())
