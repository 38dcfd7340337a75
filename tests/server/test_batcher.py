"""Which rows share a denoiser call: order, caps, and that nobody starves."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.batcher import Batcher, Job


def make_job(*rows: tuple[int, int]) -> Job:
    """A job with rows of (length, denoiser calls left)."""
    made: list[Any] = [
        SimpleNamespace(length=length, remaining=left, done=left == 0) for length, left in rows
    ]
    return Job("model", made, arrived_s=0.0)


def lengths(batcher: Batcher) -> list[int]:
    return [entry.row.length for entry in batcher.choose()]


def advance(batcher: Batcher) -> None:
    chosen = batcher.choose()
    for entry in chosen:
        made: Any = entry.row
        made.remaining -= 1
        made.done = made.remaining == 0
    batcher.drop_rows([entry for entry in chosen if entry.row.done])


def test_rows_take_turns_in_order_of_arrival_up_to_the_caps() -> None:
    batcher = Batcher(max_rows=3, max_tokens=10)
    assert batcher.choose() == []
    batcher.add(make_job((4, 1), (3, 1)))
    batcher.add(make_job((2, 1), (1, 1)))
    assert lengths(batcher) == [4, 2, 3]
    advance(batcher)
    assert lengths(batcher) == [1]


def test_a_job_of_many_rows_does_not_shut_out_a_job_of_one() -> None:
    batcher = Batcher(max_rows=32, max_tokens=2**14)
    big, small = make_job(*[(16, 4096)] * 64), make_job((8, 2))
    batcher.add(big)
    advance(batcher)
    batcher.add(small)
    chosen = batcher.choose()
    assert [entry.job for entry in chosen[:2]] == [big, small]
    assert len(chosen) == 32
    advance(batcher)
    advance(batcher)
    assert small.rows[0].done


def test_a_row_that_does_not_fit_is_passed_over_but_not_forgotten() -> None:
    batcher = Batcher(max_rows=8, max_tokens=10)
    batcher.add(make_job((6, 2)))
    batcher.add(make_job((8, 1)))
    batcher.add(make_job((3, 5), (1, 5), (1, 5)))
    assert lengths(batcher) == [6, 3, 1]
    advance(batcher)
    advance(batcher)
    assert lengths(batcher) == [8, 1, 1]  # now the oldest: younger rows no longer take its room
    advance(batcher)
    assert lengths(batcher) == [3, 1, 1]


def test_nobody_starves_under_a_stream_of_small_rows() -> None:
    rng = random.Random(0)
    batcher = Batcher(max_rows=4, max_tokens=16)
    batcher.add(make_job(*[(5, 3)] * 4))
    big = make_job((16, 2))
    batcher.add(big)
    waited = 0
    while not big.rows[0].done:
        batcher.add(make_job((rng.randrange(1, 6), rng.randrange(1, 4))))
        assert sum(lengths(batcher)) <= 16
        assert len(lengths(batcher)) <= 4
        advance(batcher)
        waited += 1
    assert waited <= 4 * 3 + 2  # at most all that came before it, and its own calls


def test_finished_rows_are_not_taken_and_jobs_can_be_dropped() -> None:
    batcher = Batcher(max_rows=4, max_tokens=16)
    first, second = make_job((3, 0), (3, 1)), make_job((2, 1), (2, 1))
    batcher.add(first)
    batcher.add(second)
    assert lengths(batcher) == [3, 2, 2]
    assert batcher.jobs() == [first, second]
    batcher.drop([first])
    assert lengths(batcher) == [2, 2]
    assert len(batcher) == 2


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(max_rows=0, max_tokens=4)
    with pytest.raises(ValueError, match="17 tokens"):
        Batcher(max_rows=1, max_tokens=16).add(make_job((17, 1)))


def test_a_batcher_for_new_weights_knows_what_the_old_one_learned_of_memory() -> None:
    batcher = Batcher(max_rows=8, max_tokens=64)
    batcher.add(make_job((3, 1)))
    batcher.cap.halve(8)
    other = batcher.emptied()
    assert (len(other), other.max_rows, other.max_tokens) == (0, 4, 64)
    other.cap.halve(4)
    assert batcher.max_rows == 2
    assert len(batcher) == 1
