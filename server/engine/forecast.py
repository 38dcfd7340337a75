"""When rows come free, in denoiser calls and the tokens of these calls: what `Retry-After` tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from prime_core.stepper import AnyRow


class RowSize(NamedTuple):
    """How much work the rows of a model are.

    Attributes:
        num_calls: denoiser calls of a row, a running mean over jobs.
        num_tokens: tokens of all these calls together, the same.
    """

    num_calls: float = 0.0
    num_tokens: float = 0.0

    def moved_towards(self, rows: Sequence[AnyRow]) -> RowSize:
        """Return the mean with the rows of one more job."""
        num_rows = max(1, len(rows))
        new = RowSize(
            sum(row.remaining for row in rows) / num_rows,
            sum(row.remaining * row.length for row in rows) / num_rows,
        )
        if not self.num_calls:
            return new
        return RowSize(*(0.9 * old + 0.1 * each for old, each in zip(self, new, strict=True)))


class Release(NamedTuple):
    """What comes free when a job is finished: rows come free job by job.

    Attributes:
        num_calls: denoiser calls from now.
        num_tokens: tokens of these calls together.
        num_rows: rows that have come free by then, of this job and those before it.
    """

    num_calls: float
    num_tokens: float
    num_rows: int


class _Need(NamedTuple):
    """What a job still needs; `shares` is W_i."""

    shares: float
    longest: int
    num_tokens: int
    num_rows: int


def releases(jobs: Iterable[Sequence[AnyRow]], max_rows: int, max_tokens: int) -> list[Release]:
    """Forecast when jobs that take turns are finished, the first one first.

    A row takes a share of every call that it is in: 1 / max_rows, or its length / max_tokens if that is more. With W_i
    the shares that job i still needs, and T_i its tokens, jobs that get equal shares of every call have together had
    sum_i min(W_i, W_j) calls when job j is finished, with sum_i T_i min(1, W_j / W_i) tokens; and it is not finished
    before its longest row.

    Args:
        jobs: the rows of each, finished ones too.
        max_rows: most rows of a call.
        max_tokens: most tokens of a call.
    """
    needs = sorted(
        _Need(
            sum(row.remaining * max(1 / max_rows, row.length / max_tokens) for row in rows),
            max((row.remaining for row in rows), default=0),
            sum(row.remaining * row.length for row in rows),
            len(rows),
        )
        for rows in jobs
    )
    # Of the jobs that are not finished yet.
    num_left, tokens_per_share = len(needs), sum(_tokens_per_share(need) for need in needs)
    shares_had = tokens_had = 0.0
    ends = []
    for need in needs:
        num_left, tokens_per_share = num_left - 1, tokens_per_share - _tokens_per_share(need)
        shares_had += need.shares
        tokens_had += need.num_tokens
        ends.append(
            Release(
                max(shares_had + num_left * need.shares, need.longest),
                tokens_had + need.shares * tokens_per_share,
                need.num_rows,
            )
        )
    ends.sort()
    freed = accumulate(end.num_rows for end in ends)
    return [end._replace(num_rows=num_rows) for end, num_rows in zip(ends, freed, strict=True)]


def _tokens_per_share(need: _Need) -> float:
    return need.num_tokens / need.shares if need.shares else 0.0


def release_of(forecast: Sequence[Release], num_rows: int) -> Release:
    """Return the moment at which so many rows have come free; the last one if there are not so many.

    Args:
        forecast: of `releases`.
        num_rows: how many.
    """
    if not forecast:
        return Release(0, 0, 0)
    return next((each for each in forecast if each.num_rows >= num_rows), forecast[-1])
