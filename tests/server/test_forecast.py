"""When rows come free: by hand, and against jobs that really take turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.batcher import Batcher, Job
from server.engine.forecast import Release, calls_until_free, releases


def rows(*each: tuple[int, int]) -> list[Any]:
    """Rows of (length, denoiser calls left)."""
    return [SimpleNamespace(length=length, remaining=left, done=left == 0) for length, left in each]


def test_one_job_frees_all_its_rows_at_its_end() -> None:
    forecast = releases([rows(*[(1, 10)] * 64)], max_rows=8, max_tokens=100)
    assert forecast == [Release(80, 64)]
    assert [calls_until_free(forecast, n) for n in (1, 64, 99)] == [80, 80, 80]
    assert calls_until_free([], 3) == 0


def test_a_job_is_not_finished_before_its_longest_row() -> None:
    assert releases([rows((1, 3), (1, 50), (1, 0))], max_rows=8, max_tokens=100) == [Release(50, 3)]


def test_small_jobs_are_finished_before_large_ones() -> None:
    forecast = releases([rows(*[(1, 10)] * 4), rows((1, 5))], max_rows=1, max_tokens=100)
    # Each gets every other call: the small one is through after 10, and then the large one has had 5 of its 40.
    assert forecast == [Release(10, 1), Release(45, 5)]


def test_the_cap_of_tokens_counts_too() -> None:
    assert releases([rows((16, 10), (16, 10))], max_rows=8, max_tokens=16) == [Release(20, 2)]


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
    calls = 0
    while len(batcher):
        calls += 1
        chosen = batcher.choose()
        for entry in chosen:
            row: Any = entry.row
            row.remaining -= 1
            row.done = row.remaining == 0
        batcher.drop_finished({entry.job for entry in chosen})
        ends |= {job: calls for job in jobs if job not in ends and _all_done(job.rows)}
    assert forecast[-1].num_rows == sum(len(job.rows) for job in jobs)
    assert forecast[-1].calls <= calls <= 1.5 * forecast[-1].calls
    first = min(ends.values())
    assert 0.3 * first <= forecast[0].calls <= 3 * first


def _all_done(each: Sequence[Any]) -> bool:
    return all(row.done for row in each)
