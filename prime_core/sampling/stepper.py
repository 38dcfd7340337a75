"""One denoiser call for any rows at any steps.

The stepper is the only place that calls the denoiser in sampling and scoring; the offline loop and the server both
drive it. Rows of different lengths, grids and settings are packed end to end and filled up to one of a few sizes
(`Denoiser.fill`), the output head runs only where something is revealed, and a row's result does not depend on its
neighbours. Rows that are scored (`prime_core.scoring.score_row`) share calls with rows that are sampled: to the trunk
they are the same, and only what is made of their logits differs.

Shapes: B rows, L tokens of a row, T packed tokens, S digits a token, V tokens of the vocabulary, P positions of
one row's event, R positions of the events of one kind of rows, Q digits that one event masks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.marginal import reveal_digits_
from kernels.nll import SubtokenNLL, subtoken_nll
from kernels.reveal import reveal_tokens_
from kernels.token_digits import TokenDigits
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser, device_of, filled_size, queued
from prime_core.sampling.curves import MAX_TEMPERATURE
from prime_core.sampling.draw_settings import join_draw_settings
from prime_core.sampling.plan import Event
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.settings import Draw, SamplingSettings
from prime_core.scoring.score_row import ScoreRow

__all__ = ["MAX_TEMPERATURE", "AnyRow", "Row", "SamplingSettings", "StepResult", "Stepper", "new_row"]

AnyRow = Row | ScoreRow

_Numbers = TypeVar("_Numbers", Tensor, NDArray[np.int64])

# Logits exist for at most this many positions at a time (50 MB at V = 50257). On a GPU launches cost more than memory;
# from 1,024 positions on the head of images computes whole pictures.
MAX_LOGIT_ROWS = 256
MAX_LOGIT_ROWS_ON_GPU = 960


class StepResult(NamedTuple):
    """What one step did to one row.

    Attributes:
        positions: (P,) int64, the tokens of the event; none of a row that is scored.
        digits: (P, S) int64, all their digits after the step. If ``ok`` is False nothing was written,
            and this is no state of the row: some positions may hold draws that were given up. Do not pass it on.
        ok: False if the row failed in this step and was left as it was.
        remasked: (Q,) int64, flat indices position S + digit of what was masked again before the call. To follow a
            row, mask these first, then write ``digits``.
    """

    positions: NDArray[np.int64]
    digits: NDArray[np.int64]
    ok: bool
    remasked: NDArray[np.int64]


class _Part(NamedTuple):
    """The rows of one kind in a call. Their positions share chunks of logits.

    Attributes:
        kind: how tokens are drawn, or that they are scored.
        rows: the rows.
        events: the next event of each.
        starts: the first packed token of each.
        counts: how many positions each has.
        positions: (R,) int64, packed tokens of all events.
        chunks: positions whose logits exist at a time; they sum to R.
    """

    kind: Draw | Literal["scored"]
    rows: Sequence[AnyRow]
    events: Sequence[Event]
    starts: Sequence[int]
    counts: list[int]
    positions: NDArray[np.int64]
    chunks: list[int]

    def in_chunks(self, numbers: _Numbers) -> Sequence[_Numbers]:
        """Cut what is there for R positions into chunks."""
        if len(self.chunks) == 1:
            return [numbers]
        stops = accumulate(self.chunks)
        return [numbers[stop - size : stop] for stop, size in zip(stops, self.chunks, strict=True)]


class _Outcome(NamedTuple):
    """What was drawn.

    Attributes:
        digits: (R, S) int64, all digits of the tokens, after the draw.
        finite: (R,) bool, False where no token could be drawn.
    """

    digits: NDArray[np.int64]
    finite: NDArray[np.bool_]


class Stepper:
    """Advances rows by one event each, with one denoiser call."""

    def __init__(
        self, denoiser: Denoiser, codec: SubtokenCodec, device: torch.device | str | None = None
    ) -> None:
        """Keep the network.

        Args:
            denoiser: network in evaluation mode.
            codec: tokens to digits.
            device: where to compute; None for the device of the network's weights.
        """
        self.denoiser = denoiser
        self.codec = codec
        self.device = device_of(denoiser) if device is None else torch.device(device)
        self._digits = TokenDigits(codec.digits.to(self.device), codec.mask_index)

    @torch.inference_mode()
    def step(self, rows: Sequence[AnyRow]) -> list[StepResult]:
        """Advance every row by its next event. If anything raises, no row has moved.

        The digits of rows move to where the network is, and stay there.

        Args:
            rows: rows that are not done, each once; all have a label, or none has.

        Returns:
            One result per row, in order.
        """
        if not rows:
            return []
        parts = _parts(rows, MAX_LOGIT_ROWS if self.device.type == "cpu" else MAX_LOGIT_ROWS_ON_GPU)
        every = [row for part in parts for row in part.rows]
        fill = self.denoiser.fill([row.length for row in every])
        y_t = self._states(parts, sum(fill))
        # What goes to a GPU goes before the trunk: later it would be waited for behind the trunk.
        inputs = [self._inputs(part) for part in parts]
        features = self._features(parts, every, fill, y_t)
        outcomes, logits = [], self._logits(parts, features)
        for part, given in zip(parts, inputs, strict=True):
            of_kind = self._score if part.kind == "scored" else self._draw
            outcomes.append(of_kind(part, given, y_t, logits))
        results: dict[AnyRow, StepResult] = {}
        for part, outcome in zip(parts, outcomes, strict=True):
            moved = _drawn(part, y_t, outcome) if isinstance(outcome, _Outcome) else _scored(part, outcome)
            results.update(zip(part.rows, moved, strict=True))
        return [results[row] for row in rows]

    def _states(self, parts: Sequence[_Part], num_filled: int) -> Tensor:
        """Return the digits (T, S) that the call sees: a copy of those of the rows, and masked tokens behind them."""
        num_digits, mask_index = self.codec.target_length, self.codec.mask_index
        states, on_cpu = [], self.device.type == "cpu"
        for part in parts:
            for row in part.rows:
                if not (row.y.is_cpu and on_cpu):
                    row.y = row.y.to(self.device)
                states.append(row.y)
        if num_filled:
            states.append(torch.full((num_filled, num_digits), mask_index, device=self.device))
        y_t = torch.cat(states)
        remasked = [
            event.remasked + start * num_digits
            for part in parts
            for event, start in zip(part.events, part.starts, strict=True)
            if len(event.remasked)
        ]
        if remasked:
            y_t.view(-1)[queued(torch.from_numpy(np.concatenate(remasked)), self.device)] = mask_index
        return y_t

    def _inputs(self, part: _Part) -> list[Tensor | None]:
        """Queue on the device what a part needs beside its features.

        Returns:
            Its positions (R,), and of rows that are scored their tokens (R,); of others what is due there (R, S), and
            the `DrawSettings`.
        """
        inputs: list[Tensor | None] = [torch.from_numpy(part.positions)]
        if part.kind == "scored":
            scored = zip(part.rows, part.events, strict=True)
            inputs.append(
                torch.cat([row.x_0[event.positions] for row, event in scored if isinstance(row, ScoreRow)])
            )
        else:
            sampled = [row for row in part.rows if isinstance(row, Row)]
            settings = join_draw_settings([row.draws for row in sampled], [row.span for row in sampled])
            arrays = (np.concatenate([event.due for event in part.events]), *settings)
            inputs += [None if each is None else torch.from_numpy(each) for each in arrays]
        if self.device.type == "cpu":
            return inputs
        return [None if each is None else queued(each, self.device) for each in inputs]

    def _features(self, parts: Sequence[_Part], rows: Sequence[AnyRow], fill: list[int], y_t: Tensor) -> Any:
        """Run the trunk once; the features of the positions of all parts, each chunk of them filled up."""
        times = [event.t for part in parts for event in part.events] + [1.0] * len(fill)
        positions = _filled([chunk for part in parts for chunk in part.in_chunks(part.positions)])
        return self.denoiser.features(
            y_t,
            [row.length for row in rows] + fill,
            queued(torch.from_numpy(np.array(times)), self.device),
            torch.from_numpy(positions),
            self._labels(rows, len(fill)),
        )

    def _labels(self, rows: Sequence[AnyRow], num_filled: int) -> Tensor | None:
        """Return the labels (B,) of the rows of a call, 0 for those that fill it up; None if rows have none."""
        labels = [label for label in (row.label for row in rows) if label is not None]
        assert len(labels) in (0, len(rows)), "rows of one model all have a label, or none has"
        return queued(torch.tensor(labels + [0] * num_filled), self.device) if labels else None

    def _draw(self, part: _Part, inputs: Sequence[Any], y_t: Tensor, logits: Iterator[Tensor]) -> _Outcome:
        """Draw the tokens of all positions (R,) into the packed state."""
        draw = reveal_digits_ if part.kind == "marginal" else reveal_tokens_
        of_chunks = ([None] * len(part.chunks) if each is None else part.in_chunks(each) for each in inputs)
        finite = [
            draw(next(logits), y_t, at, due, self._digits, *how, mask_index=self.codec.mask_index).finite
            for at, due, *how in zip(*of_chunks, strict=True)
        ]
        if y_t.is_cpu:
            return _Outcome(y_t.numpy()[part.positions], _joined(finite).numpy())
        both = torch.cat([y_t[inputs[0]], _joined(finite)[:, None]], 1).cpu().numpy()  # in one copy
        return _Outcome(both[:, :-1], both[:, -1] != 0)

    def _score(
        self, part: _Part, inputs: Sequence[Any], y_t: Tensor, logits: Iterator[Tensor]
    ) -> SubtokenNLL:
        """Return what all positions (R,) cost, on the CPU.

        The head is the one that sampling uses, over chunks of the same sizes, so that a row's numbers do not depend on
        its neighbours (the grouping of `kernels.linear_nll` would make them).
        """
        positions, x_0 = inputs
        y = y_t[positions]
        costs = [
            subtoken_nll(next(logits), seen, tokens, self._digits.table, self.codec.mask_index)
            for seen, tokens in zip(part.in_chunks(y), part.in_chunks(x_0), strict=True)
        ]
        return SubtokenNLL(*(_joined(each).cpu() for each in zip(*costs, strict=True)))

    def _logits(self, parts: Sequence[_Part], features: Any) -> Iterator[Tensor]:
        """Yield the logits (chunk, V) of every chunk of every part."""
        start = 0
        for size in (size for part in parts for size in part.chunks):
            stop = start + filled_size(size)
            yield self.denoiser.head(features[start:stop])[:size]
            start = stop


def _parts(rows: Sequence[AnyRow], max_logit_rows: int) -> list[_Part]:
    """Sort the rows of a call by kind, and lay them end to end."""
    by_kind: dict[Draw | Literal["scored"], list[AnyRow]] = {}
    for row in rows:
        by_kind.setdefault("scored" if isinstance(row, ScoreRow) else row.settings.draw, []).append(row)
    parts, end = [], 0
    for kind, own in by_kind.items():
        events = [row.event for row in own]
        *starts, end = accumulate((row.length for row in own), initial=end)
        counts = [len(event.positions) for event in events]
        positions = np.concatenate(
            [event.positions + start for event, start in zip(events, starts, strict=True)]
        )
        whole, rest = divmod(len(positions), max_logit_rows)
        parts.append(
            _Part(
                kind,
                own,
                events,
                starts,
                counts,
                positions,
                [max_logit_rows] * whole + [rest] * (rest > 0),
            )
        )
    return parts


def _drawn(part: _Part, y_t: Tensor, outcome: _Outcome) -> Iterator[StepResult]:
    """Move rows on whose positions were drawn; one without finite logits is marked and left as it was."""
    digits, finite = outcome
    all_ok, stop = bool(finite.all()), 0
    after = y_t.numpy() if y_t.is_cpu else None  # for numpy, see `Event`
    for row, event, start in zip(part.rows, part.events, part.starts, strict=True):
        first, stop = stop, stop + len(event.positions)
        ok = all_ok or bool(finite[first:stop].all())
        if ok:
            if after is None:
                row.y.copy_(y_t[start : start + row.length])
            else:
                row.y.numpy()[:] = after[start : start + row.length]
            row.next_event += 1
        else:
            row.failed = True
        yield StepResult(event.positions, digits[first:stop], ok, event.remasked)


def _scored(part: _Part, nll: SubtokenNLL) -> Iterator[StepResult]:
    """Let rows that are scored count what their positions cost."""
    nothing = np.zeros(0, dtype=np.int64)
    of_rows = zip(*(each.split(part.counts) for each in nll), strict=True)
    for row, event, own in zip(part.rows, part.events, of_rows, strict=True):
        assert isinstance(row, ScoreRow)
        ok = row.record(event.positions, SubtokenNLL(*own))
        yield StepResult(nothing, np.zeros((0, row.y.shape[1]), dtype=np.int64), ok, nothing)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _filled(chunks: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Fill up every chunk of positions, and then the whole, with position 0, whose features are not used.

    Networks have matrix products over these rows too, and their shapes must be few (`filled_size`).
    """
    sizes = [filled_size(len(chunk)) for chunk in chunks]
    filled, start = np.zeros(filled_size(sum(sizes)), dtype=np.int64), 0
    for chunk, size in zip(chunks, sizes, strict=True):
        filled[start : start + len(chunk)] = chunk
        start += size
    return filled
