"""When rows come free, in denoiser calls and the tokens of these calls: what `Retry-After` tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from prime_core.sampling.stepper import AnyRow


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


class _End(NamedTuple):
    """After how many calls a job is finished."""

    num_calls: float
    need: _Need


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
        _Need(
            sum(row.remaining * max(1 / max_rows, row.length / max_tokens) for row in rows),
            max((row.remaining for row in rows), default=0),
            sum(row.remaining * row.length for row in rows),
            len(rows),
        )
        for rows in jobs
    )
    num_left, shares_had = len(needs), 0.0
    ends = []
    for need in needs:
        num_left -= 1
        shares_had += need.shares
        ends.append(_End(max(shares_had + num_left * need.shares, need.longest), need))
    ends.sort()
    return list(_with_tokens(ends))


def _with_tokens(ends: Sequence[_End]) -> Iterator[Release]:
    """Yield what comes free, and the tokens that the calls until then have: never fewer than until an earlier one.

    With T_i the tokens of job i, those that are finished have had all of theirs. Of the others, one that is held up by
    its longest row is in every call, and has had T_i c_j / c_i when job j is finished after c_j calls; the rest have
    had T_i W_j / W_i.
    """
    per_call, per_share = (sum(rates) for rates in zip((0.0, 0.0), *map(_rates, ends), strict=True))
    num_rows, finished, tokens = 0, 0, 0.0
    for end in ends:
        of_call, of_share = _rates(end)
        per_call, per_share = per_call - of_call, per_share - of_share
        num_rows += end.need.num_rows
        finished += end.need.num_tokens
        tokens = max(tokens, finished + end.num_calls * per_call + end.need.shares * per_share)
        yield Release(end.num_calls, tokens, num_rows)


def _rates(end: _End) -> tuple[float, float]:
    """Return the tokens of a job for each call, if its longest row decides, else 0; and those for each share."""
    num_calls, need = end
    if not need.num_tokens:
        return 0.0, 0.0
    if num_calls <= need.longest:
        return need.num_tokens / num_calls, 0.0
    return 0.0, need.num_tokens / need.shares


def release_of(forecast: Sequence[Release], num_rows: int) -> Release:
    """Return the moment at which so many rows have come free; the last one if there are not so many.

    Args:
        forecast: of `releases`.
        num_rows: how many.
    """
    if not forecast:
        return Release(0, 0, 0)
    return next((each for each in forecast if each.num_rows >= num_rows), forecast[-1])
