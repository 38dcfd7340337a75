"""When rows come free: by hand, and against jobs that really take turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.batcher import Batcher, Job
from server.engine.forecast import Release, RowSize, release_of, releases


def rows(*each: tuple[int, int]) -> list[Any]:
    """Rows of (length, denoiser calls left)."""
    return [SimpleNamespace(length=length, remaining=left, done=left == 0) for length, left in each]


def test_one_job_frees_all_its_rows_at_its_end() -> None:
    forecast = releases([rows(*[(1, 10)] * 64)], max_rows=8, max_tokens=100)
    assert forecast == [Release(80, 640, 64)]
    assert [release_of(forecast, n) for n in (1, 64, 99)] == 3 * forecast
    assert release_of([], 3) == Release(0, 0, 0)


def test_a_job_is_not_finished_before_its_longest_row() -> None:
    assert releases([rows((1, 3), (1, 50), (1, 0))], max_rows=8, max_tokens=100) == [Release(50, 53, 3)]


def test_small_jobs_are_finished_before_large_ones() -> None:
    forecast = releases([rows(*[(1, 10)] * 4), rows((1, 5))], max_rows=1, max_tokens=100)
    # Each gets every other call: the small one is through after 10, and then the large one has had 5 of its 40.
    assert forecast == [Release(10, 10, 1), Release(45, 45, 5)]
    assert [release_of(forecast, n) for n in (1, 2)] == forecast


def test_tokens_are_those_of_the_calls_until_then() -> None:
    # When the first is through, the second has had as many calls as it has, of rows three times as long.
    forecast = releases([rows((2, 10)), rows((6, 30))], max_rows=1, max_tokens=100)
    assert forecast == [Release(20, 10 * 2 + 10 * 6, 1), Release(40, 10 * 2 + 30 * 6, 2)]


def test_tokens_of_calls_that_hold_all_rows_are_those_of_each_job_until_then() -> None:
    forecast = releases([rows((10, 100)), rows(*[(10, 50)] * 8)], max_rows=64, max_tokens=8192)
    assert forecast == [Release(50, 8 * 500 + 500, 8), Release(100, 8 * 500 + 1000, 9)]


@pytest.mark.parametrize("max_rows", [1, 8, 64])
def test_more_rows_never_come_free_sooner(max_rows: int) -> None:
    draw = random.Random(max_rows)
    for _ in range(50):
        jobs = [
            rows(*[(draw.choice([8, 32, 128]), draw.randrange(100))] * draw.randrange(1, 9)) for _ in range(9)
        ]
        forecast = releases(jobs, max_rows, 2048)
        for each in zip(*forecast, strict=True):
            assert list(each) == sorted(each)
        assert forecast[-1].num_tokens == pytest.approx(
            sum(row.remaining * row.length for job in jobs for row in job)
        )


def test_how_much_work_a_row_is() -> None:
    size = RowSize().moved_towards(rows((2, 10), (4, 20)))
    assert size == (15, 50)
    assert size.moved_towards(rows((1, 5))) == pytest.approx((14, 45.5))
    assert RowSize().moved_towards([]) == (0, 0)


def test_the_cap_of_tokens_counts_too() -> None:
    assert releases([rows((16, 10), (16, 10))], max_rows=8, max_tokens=16) == [Release(20, 320, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_about_what_the_batcher_does(seed: int) -> None:
    draw = random.Random(seed)
    batcher = Batcher(max_rows=4, max_tokens=64)
    jobs = [
        Job("model", rows(*[(draw.randint(1, 16), draw.randint(5, 40))] * draw.randint(1, 6)), arrived_s=0.0)
        for _ in range(6)
    ]
    forecast = releases([job.rows for job in jobs], 4, 64)
    for job in jobs:
        batcher.add(job)
    ends: dict[Job, int] = {}
    calls = tokens = 0
    while len(batcher):
        calls += 1
        chosen = batcher.choose()
        for entry in chosen:
            row: Any = entry.row
            row.remaining -= 1
            row.done = row.remaining == 0
            tokens += row.length
        batcher.drop_rows([entry for entry in chosen if entry.row.done])
        ends |= {job: calls for job in jobs if job not in ends and _all_done(job.rows)}
    assert forecast[-1].num_rows == sum(len(job.rows) for job in jobs)
    assert forecast[-1].num_calls <= calls <= 1.5 * forecast[-1].num_calls
    assert forecast[-1].num_tokens == pytest.approx(tokens)
    first = min(ends.values())
    assert 0.3 * first <= forecast[0].num_calls <= 3 * first


def _all_done(each: Sequence[Any]) -> bool:
    return all(row.done for row in each)
