"""One denoiser call for any rows at any steps.

The stepper is the only place that calls the denoiser in sampling and scoring; the offline loop and the server both
drive it. Rows of different lengths, grids and settings are packed end to end and filled up to one of a few sizes
(`Denoiser.fill`), the output head runs only where something is revealed, and a row's result does not depend on its
neighbours. Rows that are scored (`prime_core.score_row`) share calls with rows that are sampled: to the trunk they are
the same, and only what is made of their logits differs.

Shapes: B rows, L tokens of a row, T packed tokens, S digits a token, V tokens of the vocabulary, P positions of
one row's event, R positions of all events, Q digits that one event masks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.marginal import reveal_digits
from kernels.noise import Purpose, seed_words, uniform
from kernels.reveal import Revealed, reveal_tokens
from kernels.token_digits import TokenDigits
from prime_core.codec import SubtokenCodec
from prime_core.curves import MAX_TEMPERATURE
from prime_core.models.denoiser import Denoiser, device_of, filled_size
from prime_core.plan import Event
from prime_core.row import Row, new_row
from prime_core.score_call import score_rows
from prime_core.score_row import ScoreRow
from prime_core.settings import SamplingSettings

__all__ = ["MAX_TEMPERATURE", "AnyRow", "Row", "SamplingSettings", "StepResult", "Stepper", "new_row"]

AnyRow = Row | ScoreRow

# Logits exist for at most this many positions at a time (50 MB at V = 50257).
MAX_LOGIT_ROWS = 256


class StepResult(NamedTuple):
    """What one step did to one row.

    Attributes:
        positions: (P,) int64 on the CPU, the tokens of the event; none of a row that is scored.
        digits: (P, S) int64 on the CPU, all their digits after the step. If ``ok`` is False nothing was written,
            and this is no state of the row: some positions may hold draws that were given up. Do not pass it on.
        ok: False if the row failed in this step and was left as it was.
        remasked: (Q,) int64 on the CPU, flat indices position S + digit of what was masked again before the call. To
            follow a row, mask these first, then write ``digits``.
    """

    positions: Tensor
    digits: Tensor
    ok: bool
    remasked: Tensor


class _Draws(NamedTuple):
    """How the tokens of R gathered positions are drawn.

    Attributes:
        y: (R, S) int64, the digits before the draw.
        due: (R, S) bool, the digits to reveal.
        u: (R, S) float64, one uniform number per digit.
        temperature: (R,) float32.
        top_k: (R,) int64.
        top_p: (R,) float32.
        marginal: (R,) bool, whether digits are drawn alone.
    """

    y: Tensor
    due: Tensor
    u: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    marginal: Tensor

    def select(self, rows: Tensor) -> _Draws:
        return _Draws(*(part[rows] for part in self))


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
        """Advance every row by its next event.

        Args:
            rows: rows that are not done, each once; all have a label, or none has.

        Returns:
            One result per row, in order.
        """
        if not rows:
            return []
        drawn = [row for row in rows if isinstance(row, Row)]
        scored = [row for row in rows if isinstance(row, ScoreRow)]
        every: list[AnyRow] = [*drawn, *scored]
        events = [row.event for row in every]
        states = [
            _masked_again(row, event, self.codec.mask_index) for row, event in zip(every, events, strict=True)
        ]
        # The positions of one kind lie together: tokens are drawn for the first, and looked up for the others.
        first, second = slice(len(drawn)), slice(len(drawn), None)
        chunks, more = _chunk_sizes(events[first]), _chunk_sizes(events[second])
        features = self._features(every, events, states, [*chunks, *more])
        results: dict[AnyRow, StepResult] = {}
        if drawn:
            revealed = self._reveal_rows(drawn, events[first], states[first], features, chunks)
            results.update(zip(drawn, revealed, strict=True))
        if scored:
            features = features[sum(map(filled_size, chunks)) :]
            oks = score_rows(
                self.denoiser, self._digits, scored, events[second], states[second], features, more
            )
            results.update(zip(scored, map(self._nothing_revealed, oks), strict=True))
        return [results[row] for row in rows]

    def _reveal_rows(
        self,
        rows: Sequence[Row],
        events: Sequence[Event],
        states: Sequence[Tensor],
        features: Any,
        chunks: Sequence[int],
    ) -> list[StepResult]:
        """Draw and write what the events of some rows reveal."""
        revealed = self._reveal(features, chunks, self._draws(rows, events, states))
        sizes = [len(event.positions) for event in events]
        parts = (part.split(sizes) for part in (revealed.y, revealed.finite))
        return [_write(*result) for result in zip(rows, events, states, *parts, strict=True)]

    def _nothing_revealed(self, ok: bool) -> StepResult:
        """Return the result of a row that was scored."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return StepResult(nothing, nothing.view(0, 1).expand(0, self.codec.target_length), ok, nothing)

    def _features(
        self,
        rows: Sequence[AnyRow],
        events: Sequence[Event],
        states: Sequence[Tensor],
        chunks: Sequence[int],
    ) -> Any:
        """Run the trunk once over all rows; features of the due positions, each chunk of them filled up."""
        lengths = [row.length for row in rows]
        starts = [sum(lengths[:index]) for index in range(len(rows))]
        fill = self.denoiser.fill(lengths)
        masked = torch.full((sum(fill), self.codec.target_length), self.codec.mask_index, device=self.device)
        y_t = torch.cat([*(y.to(self.device) for y in states), masked])
        t = torch.tensor(
            [event.t for event in events] + [1.0] * len(fill), dtype=torch.float64, device=self.device
        )
        positions = torch.cat([event.positions + start for event, start in zip(events, starts, strict=True)])
        labels = self._labels(rows, len(fill))
        return self.denoiser.features(
            y_t, lengths + fill, t, _filled_positions(positions, chunks).to(self.device), labels
        )

    def _labels(self, rows: Sequence[AnyRow], num_filled: int) -> Tensor | None:
        """Return the labels (B,) of the rows of a call, 0 for those that fill it up; None if rows have none."""
        labels = [row.label for row in rows if row.label is not None]
        assert len(labels) in (0, len(rows)), "rows of one model all have a label, or none has"
        return torch.tensor(labels + [0] * num_filled, device=self.device) if labels else None

    def _draws(self, rows: Sequence[Row], events: Sequence[Event], states: Sequence[Tensor]) -> _Draws:
        """Gather how the tokens of all events are drawn; on the CPU but for the digits."""
        num_digits = self.codec.target_length
        counts = torch.tensor([len(event.positions) for event in events])
        seeds = torch.tensor([seed_words(row.seed) for row in rows]).repeat_interleave(counts, 0)
        # A digit that is revealed once numbers its draw by itself, and one that is revealed again by step and digit.
        first = torch.tensor(
            [
                num_digits * (1 + event.step) if row.plan.remasks else 0
                for row, event in zip(rows, events, strict=True)
            ]
        ).repeat_interleave(counts)
        index = first[:, None] + torch.arange(num_digits)
        positions = torch.cat([event.positions for event in events])[:, None].expand_as(index)
        settings = [row.settings for row in rows]
        temperatures = [s.temperature_at(event.t) for s, event in zip(settings, events, strict=True)]
        top_k = [min(s.top_k, self.codec.vocab_size) for s in settings]
        return _Draws(
            y=torch.cat([y[e.positions.to(y.device)] for y, e in zip(states, events, strict=True)]),
            due=torch.cat([event.due for event in events]),
            u=uniform(seeds[:, None].expand(*index.shape, 2), positions, index, Purpose.DRAW),
            temperature=torch.tensor(temperatures).repeat_interleave(counts),
            top_k=torch.tensor(top_k).repeat_interleave(counts),
            top_p=torch.tensor([s.top_p for s in settings]).repeat_interleave(counts),
            marginal=torch.tensor([s.draw == "marginal" for s in settings]).repeat_interleave(counts),
        )

    def _reveal(self, features: Any, chunks: Sequence[int], draws: _Draws) -> Revealed:
        """Draw the tokens of all gathered positions; the result is on the CPU."""
        start, drawn = 0, []
        for size, chunk in zip(
            chunks, zip(*(part.split(chunks) for part in draws), strict=True), strict=True
        ):
            stop = start + filled_size(size)
            drawn.append(self._reveal_chunk(self.denoiser.head(features[start:stop])[:size], _Draws(*chunk)))
            start = stop
        return Revealed(*(torch.cat(part).cpu() for part in zip(*drawn, strict=True)))

    def _reveal_chunk(self, logits: Tensor, draws: _Draws) -> Revealed:
        """Draw the tokens of one chunk of positions from their logits (R, V)."""
        marginal = draws.marginal.nonzero()[:, 0]
        if len(marginal) in (0, len(logits)):
            return self._draw(logits, draws, marginal=len(marginal) > 0)
        joint = (~draws.marginal).nonzero()[:, 0]
        parts = [
            self._draw(logits[rows.to(self.device)], draws.select(rows), marginal=rows is marginal)
            for rows in (marginal, joint)
        ]
        order = torch.cat([marginal, joint]).argsort().to(self.device)
        return Revealed(*(torch.cat(part)[order] for part in zip(*parts, strict=True)))

    def _draw(self, logits: Tensor, draws: _Draws, *, marginal: bool) -> Revealed:
        """Draw tokens, or every digit alone, from logits (R, V)."""
        y, due, u, temperature = (part.to(self.device) for part in draws[:4])
        # On the CPU it is known whether any row is truncated; without, a kernel reads the logits only once.
        top_k = draws.top_k.to(self.device) if bool(draws.top_k.any()) else None
        top_p = draws.top_p.to(self.device) if bool(draws.top_p.lt(1).any()) else None
        mask_index = self.codec.mask_index
        if marginal:
            return reveal_digits(
                logits, y, due, self._digits, u, temperature, top_k, top_p, mask_index=mask_index
            )
        u = u.gather(1, due.int().argmax(-1, keepdim=True))[
            :, 0
        ]  # the lowest digit that is due numbers the draw
        return reveal_tokens(
            logits, y, due, self._digits, u, temperature, top_k, top_p, mask_index=mask_index
        )


def _masked_again(row: AnyRow, event: Event, mask_index: int) -> Tensor:
    """Return the digits (L, S) that the call of an event sees; the row itself is left as it is."""
    if not len(event.remasked):
        return row.y
    y = row.y.clone()
    y.view(-1)[event.remasked.to(y.device)] = mask_index
    return y


def _write(row: Row, event: Event, state: Tensor, y: Tensor, finite: Tensor) -> StepResult:
    """Write the drawn digits (P, S) of one row and move it on, or mark it failed and leave it as it was."""
    ok = bool(finite.all())
    if ok:
        row.y = state
        row.y[event.positions.to(state.device)] = y.to(state.device)
        row.next_event += 1
    else:
        row.failed = True
    return StepResult(event.positions, y, ok, event.remasked)


def _chunk_sizes(events: Sequence[Event]) -> list[int]:
    """Cut the positions of some events into chunks whose logits exist at a time."""
    whole, rest = divmod(sum(len(event.positions) for event in events), MAX_LOGIT_ROWS)
    return [MAX_LOGIT_ROWS] * whole + [rest] * (rest > 0)


def _filled_positions(positions: Tensor, chunks: Sequence[int]) -> Tensor:
    """Fill up every chunk of positions (R,), and then the whole, with position 0, whose features are not used.

    Networks have matrix products over these rows too, and their shapes must be few (`filled_size`).
    """
    filled = torch.cat(
        [F.pad(chunk, (0, filled_size(len(chunk)) - len(chunk))) for chunk in positions.split(chunks)]
    )
    return F.pad(filled, (0, filled_size(len(filled)) - len(filled)))
