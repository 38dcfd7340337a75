"""When rows come free, in denoiser calls: what `Retry-After` tells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from prime_core.stepper import AnyRow


class Release(NamedTuple):
    """What comes free when a job is finished: rows come free job by job.

    Attributes:
        calls: denoiser calls from now.
        num_rows: rows that have come free by then, of this job and those before it.
    """

    calls: float
    num_rows: int


def releases(jobs: Iterable[Sequence[AnyRow]], max_rows: int, max_tokens: int) -> list[Release]:
    """Forecast when jobs that take turns are finished, the first one first.

    A row takes a share of every call that it is in: 1 / max_rows, or its length / max_tokens if that is more. With W_i
    the shares that job i still needs, jobs that get equal shares of every call have together had sum_i min(W_i, W_j)
    calls when job j is finished; and it is not finished before its longest row.

    Args:
        jobs: the rows of each, finished ones too.
        max_rows: most rows of a call.
        max_tokens: most tokens of a call.
    """
    needs = sorted(
        (
            sum(row.remaining * max(1 / max_rows, row.length / max_tokens) for row in rows),
            max((row.remaining for row in rows), default=0),
            len(rows),
        )
        for rows in jobs
    )
    had = accumulate(need for need, _, _ in needs)
    ends = sorted(
        (max(so_far + (len(needs) - number) * need, longest), num_rows)
        for number, (so_far, (need, longest, num_rows)) in enumerate(zip(had, needs, strict=True), start=1)
    )
    freed = accumulate(num_rows for _, num_rows in ends)
    return [Release(calls, so_far) for (calls, _), so_far in zip(ends, freed, strict=True)]


def calls_until_free(forecast: Sequence[Release], num_rows: int) -> int:
    """Return after how many calls so many rows have come free; after all of them if there are not so many.

    Args:
        forecast: of `releases`.
        num_rows: how many.
    """
    if not forecast:
        return 0
    release = next((each for each in forecast if each.num_rows >= num_rows), forecast[-1])
    return math.ceil(round(release.calls, 9))
