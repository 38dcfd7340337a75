"""The rows of one kind in a denoiser call: where they lie, what they need beside logits, and what becomes of them.

A call has at most three parts: rows whose tokens are drawn, rows whose digits are drawn alone, and rows that are
scored. A part first reads its logits, and only moves its rows on when all parts have (`Part.take`, `Part.move`): if
anything raises before, no row has moved. Until then a GPU has only been given work; what came of it, and which rows
failed, is waited for last (`Part.results`).

Shapes: L tokens of a row, T packed tokens, S digits a token, V tokens of the vocabulary, P positions of one row's
event, R positions of the events of a part, Q digits that one event masks again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.marginal import reveal_digits_
from kernels.nll import SubtokenNLL, subtoken_nll
from kernels.reveal import reveal_tokens_
from kernels.token_digits import TokenDigits
from kernels.transfers import HostCopy, queued
from prime_core.sampling.draw_settings import join_draw_settings
from prime_core.sampling.plan import Event
from prime_core.sampling.row import Row
from prime_core.scoring.score_row import ScoreRow

_Row = TypeVar("_Row", Row, ScoreRow)
_Numbers = TypeVar("_Numbers", Tensor, NDArray[np.int64])


class StepResult(NamedTuple):
    """What one step did to one row.

    Attributes:
        positions: (P,) int64, the tokens of the event; none of a row that is scored.
        digits: (P, S) int64, all their digits after the step. If ``ok`` is False this is no state of the row: some
            positions may hold draws that were given up. Do not pass it on.
        ok: False if the row has failed, in this step or before; it is left as it was before that.
        remasked: (Q,) int64, flat indices position S + digit of what was masked again before the call. To follow a
            row, mask these first, then write ``digits``.
    """

    positions: NDArray[np.int64]
    digits: NDArray[np.int64]
    ok: bool
    remasked: NDArray[np.int64]


class Part(ABC, Generic[_Row]):
    """Rows of one kind, laid end to end. Their positions share chunks of logits.

    Attributes:
        rows: the rows.
        events: the next event of each.
        starts: the first packed token of each.
        stop: the packed token behind the last.
        counts: how many positions each has.
        positions: (R,) int64, packed tokens of all events.
        chunks: numbers of positions whose logits exist at a time; they sum to R.
    """

    def __init__(self, rows: Sequence[_Row], start: int, max_logit_rows: int) -> None:
        """Lay out rows that are not done.

        Args:
            rows: of one kind.
            start: the first packed token of the first.
            max_logit_rows: most positions of a chunk.
        """
        self.rows: Sequence[_Row] = rows
        self.events: list[Event] = [row.event for row in rows]
        *self.starts, self.stop = accumulate((row.length for row in rows), initial=start)
        self.counts = [len(event.positions) for event in self.events]
        self.positions = np.concatenate(
            [event.positions + first for event, first in zip(self.events, self.starts, strict=True)]
        )
        whole, rest = divmod(len(self.positions), max_logit_rows)
        self.chunks = [max_logit_rows] * whole + [rest] * (rest > 0)

    def in_chunks(self, numbers: _Numbers) -> Sequence[_Numbers]:
        """Cut what is there for R positions into chunks."""
        if len(self.chunks) == 1:
            return [numbers]
        stops = accumulate(self.chunks)
        return [numbers[stop - size : stop] for stop, size in zip(stops, self.chunks, strict=True)]

    def _in_chunks_or_none(self, numbers: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(self.chunks) if numbers is None else self.in_chunks(numbers)

    @abstractmethod
    def queue(self, device: torch.device) -> None:
        """Queue on the device what the part needs beside its logits."""

    @abstractmethod
    def take(self, logits: Iterator[Tensor], y_t: Tensor, digits: TokenDigits) -> None:
        """Read the logits of all positions; no row moves.

        Args:
            logits: yields (chunk, V) for every chunk.
            y_t: (T, S) packed digits that the call saw. What is drawn is written there.
            digits: the digits of every token.
        """

    @abstractmethod
    def move(self) -> None:
        """Move the rows on, as if none had failed; this raises nothing."""

    @abstractmethod
    def results(self) -> Iterator[StepResult]:
        """Wait for the call; yield the result of each row, in order, and take back those that failed."""


class DrawnPart(Part[Row]):
    """Rows of which tokens, or single digits, are drawn."""

    def queue(self, device: torch.device) -> None:
        """Queue positions, what is due there, and how it is drawn."""
        settings = join_draw_settings([row.draws for row in self.rows], [row.span for row in self.rows])
        self._at = _on(device, self.positions)
        self._due = _on(device, np.concatenate([event.due for event in self.events]))
        self._u = _on(device, settings.u)
        self._how = [None if each is None else _on(device, each) for each in settings[1:]]

    def take(self, logits: Iterator[Tensor], y_t: Tensor, digits: TokenDigits) -> None:
        """Draw the digits that are due, into the packed state."""
        draw = reveal_digits_ if self.rows[0].settings.draw == "marginal" else reveal_tokens_
        inputs = [self.in_chunks(each) for each in (self._at, self._due, self._u)]
        how = [self._in_chunks_or_none(each) for each in self._how]
        finite = _joined(
            [
                draw(next(logits), y_t, at, due, digits, u, *each, mask_index=digits.mask_index).finite
                for at, due, u, *each in zip(*inputs, *how, strict=True)
            ]
        )
        self._after = [
            y_t[start : start + row.length].clone() for row, start in zip(self.rows, self.starts, strict=True)
        ]
        # What is finished is on its way home before calls behind this one could keep it.
        self._home = [
            HostCopy(y) if row.remaining == 1 else None for row, y in zip(self.rows, self._after, strict=True)
        ]
        # On a CPU they lie there; from a GPU they come in one copy.
        self._drawn = (
            (y_t, finite) if y_t.is_cpu else HostCopy(torch.cat([y_t[self._at], finite[:, None]], 1))
        )

    def move(self) -> None:
        """Give every row its digits after the call: new ones, for a row that fails gets the old ones back."""
        self._before = [(row.y, row.next_event) for row in self.rows]
        for row, y in zip(self.rows, self._after, strict=True):
            row.y = y
            row.next_event += 1

    def results(self) -> Iterator[StepResult]:
        """Take back rows without finite logits."""
        if isinstance(self._drawn, HostCopy):
            drawn = self._drawn.wait().numpy()
            digits, finite = drawn[:, :-1], drawn[:, -1] != 0
        else:
            y_t, is_finite = self._drawn
            digits, finite = y_t.numpy()[self.positions], is_finite.numpy()
        all_ok, stop = bool(finite.all()), 0
        for row, event, before, home in zip(self.rows, self.events, self._before, self._home, strict=True):
            first, stop = stop, stop + len(event.positions)
            if row.failed:
                pass
            elif not (all_ok or finite[first:stop].all()):
                row.y, row.next_event = before
                row.failed = True
            elif home is not None:
                row.y = home.wait()
            yield StepResult(event.positions, digits[first:stop], not row.failed, event.remasked)


class ScoredPart(Part[ScoreRow]):
    """Rows of which masked states are scored.

    The head is the one that sampling uses, over chunks of the same sizes, so that a row's numbers do not depend on its
    neighbours (the grouping of `kernels.linear_nll` would make them).
    """

    def queue(self, device: torch.device) -> None:
        """Queue positions and the tokens there."""
        self._at = _on(device, self.positions)
        tokens = [row.x_0[event.positions] for row, event in zip(self.rows, self.events, strict=True)]
        self._x_0 = queued(torch.cat(tokens), device)

    def take(self, logits: Iterator[Tensor], y_t: Tensor, digits: TokenDigits) -> None:
        """Compute what all positions cost."""
        costs = [
            subtoken_nll(next(logits), seen, tokens, digits.table, digits.mask_index)
            for seen, tokens in zip(self.in_chunks(y_t[self._at]), self.in_chunks(self._x_0), strict=True)
        ]
        self._nll = HostCopy(torch.stack([_joined(each) for each in zip(*costs, strict=True)]))

    def move(self) -> None:
        """Let the next call of each row be another."""
        for row in self.rows:
            row.next_event += 1

    def results(self) -> Iterator[StepResult]:
        """Let the rows count what their positions cost."""
        nothing = np.zeros(0, dtype=np.int64)
        of_rows = self._nll.wait().split(self.counts, 1)
        for row, event, own in zip(self.rows, self.events, of_rows, strict=True):
            if not row.failed:
                row.record(event, SubtokenNLL(*own))
            yield StepResult(nothing, np.zeros((0, row.y.shape[1]), dtype=np.int64), not row.failed, nothing)


def parts_of(rows: Sequence[Row | ScoreRow], max_logit_rows: int) -> list[Part[Row] | Part[ScoreRow]]:
    """Sort the rows of a call by kind and length, and lay the parts end to end.

    Rows of one length are attended together, and side by side nothing is gathered for that.

    Args:
        rows: rows that are not done, at least one.
        max_logit_rows: most positions whose logits exist at a time.
    """
    drawn: dict[str, list[Row]] = {}
    scored: list[ScoreRow] = []
    for row in sorted(rows, key=lambda row: row.length):
        if isinstance(row, ScoreRow):
            scored.append(row)
        else:
            drawn.setdefault(row.settings.draw, []).append(row)
    parts: list[Part[Row] | Part[ScoreRow]] = []
    stop = 0
    for own in drawn.values():
        parts.append(DrawnPart(own, stop, max_logit_rows))
        stop = parts[-1].stop
    if scored:
        parts.append(ScoredPart(scored, stop, max_logit_rows))
    return parts


def _on(device: torch.device, numbers: NDArray[np.generic]) -> Tensor:
    """Return numpy's numbers as a tensor that is, or will be, on the device."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else queued(tensor, device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
