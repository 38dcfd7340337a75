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


def step(positions: list[int], digits: list[list[int]], remasked: list[int] | None = None) -> StepResult:
    masked = np.array([] if remasked is None else remasked, dtype=np.int64)
    revealed_digits = np.array(digits, dtype=np.int64).reshape(-1, 2)
    return StepResult(np.array(positions, dtype=np.int64), revealed_digits, True, masked)


def rows_of(model_path: Path, **fields: Any) -> tuple[list[Row], int]:
    checkpoint = load_checkpoint(model_path)
    rows = prepare_rows(checkpoint, seed=0, **fields).rows
    return [row for row in rows if isinstance(row, Row)], checkpoint.codec.mask_index


def test_a_token_has_changed_when_any_of_its_digits_is_not_what_it_was(model_path: Path) -> None:
    async def follow() -> None:
        rows, mask = rows_of(model_path, max_tokens=3, steps="exact")
        feed = Feed(rows, mask)
        feed.advanced(0, step([1], [[3, mask]]))
        (first,) = feed.take(None).rows
        assert (first.positions.tolist(), first.nfe, first.step) == ([1], 1, rows[0].plan.steps[0])
        feed.advanced(0, step([1, 2], [[3, mask], [1, 2]]))  # that of token 1 is as it was
        feed.advanced(0, step([], [], remasked=[2]))  # the high digit of token 1
        (second,) = feed.take(None).rows
        assert second.positions.tolist() == [1, 2]
        assert second.y.tolist() == [[mask, mask], [mask, mask], [1, 2]]
        assert (second.nfe, second.step) == (3, rows[0].plan.steps[2])
        assert first.y.tolist() == [[mask, mask], [3, mask], [mask, mask]]  # what was told stays as it was
        assert rows[0].y.eq(mask).all()  # and the engine's row is the engine's

    asyncio.run(follow())


def test_a_row_that_failed_is_told_by_its_error_alone(model_path: Path) -> None:
    async def follow() -> None:
        feed = Feed(*rows_of(model_path, max_tokens=3, steps="exact"))
        feed.advanced(0, step([1], [[3, 3]])._replace(ok=False))
        changes = feed.take(None)
        assert (changes.rows, changes.progress) == ([], 0.0)

    asyncio.run(follow())


def test_progress_is_that_of_all_rows_and_the_time_left_that_of_the_slowest(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def follow() -> None:
        rows, mask = rows_of(model_path, n=2, max_tokens=3, steps="exact")
        feed = Feed(rows, mask)
        monkeypatch.setattr("server.engine.feed.time.monotonic", lambda: 108.0)
        assert feed.take(None) == ([], 0.0, None)
        assert feed.take(100.0).eta_s is None
        for position in range(2):
            feed.advanced(0, step([position], [[1, 1]]))
        changes = feed.take(100.0)
        assert changes.progress == 2 / 12
        assert changes.eta_s == 8.0 / 2 * 6  # two calls in 8 s, and the other row has had none of its six
        feed.advanced(1, step([0], [[1, 1]]))
        changes = feed.take(100.0)
        assert (changes.progress, changes.eta_s) == (3 / 12, 8.0 / 2 * 5)

    asyncio.run(follow())


def test_a_reader_that_has_looked_waits_until_more_happens(model_path: Path) -> None:
    async def follow() -> None:
        feed = Feed(*rows_of(model_path, max_tokens=3, steps="exact"))
        feed.advanced(0, step([1], [[3, 3]]))
        await asyncio.wait_for(feed.wait(), 10)
        feed.take(None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(feed.wait(), 0.05)

    asyncio.run(follow())


def test_a_step_whose_reader_has_ended_with_its_loop_is_no_failure(model_path: Path) -> None:
    async def begin() -> Feed:
        return Feed(*rows_of(model_path, max_tokens=3, steps="exact"))

    asyncio.run(begin()).advanced(0, step([1], [[3, 3]]))
