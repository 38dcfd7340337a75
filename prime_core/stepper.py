"""One denoiser call for any rows at any steps.

The stepper is the only place that calls the denoiser in sampling; the offline loop and the server both drive
it. Rows of different lengths, grids and settings are packed end to end and filled up to one of a few sizes
(`filled_size`), the output head runs only where something is revealed, and a row's result does not depend on
its neighbours.

Shapes: T packed tokens, S digits a token, P positions of one row's event, R positions of all events, D
features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.noise import Purpose, seed_words, uniform
from kernels.reveal import Revealed, reveal_tokens
from prime_core.canvas import Canvas
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser, device_of, filled_size
from prime_core.plan import Event, RevealPlan, Steps, draw_plan
from prime_core.schedule import Schedule

# Logits exist for at most this many positions at a time (50 MB at V = 50257).
MAX_LOGIT_ROWS = 256

MAX_TEMPERATURE = 100.0


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How a row's tokens are drawn.

    Attributes:
        temperature: 0..100; 0 takes the most probable token.
        top_p: (0, 1], the smallest set of tokens with at least this probability is kept.
        top_k: number of most probable tokens to keep, 0 = all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the setting and its range.
        """
        if not _is_number(self.temperature) or not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must be a number in [0, {MAX_TEMPERATURE:g}]")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError("top_p must be a number in (0, 1]")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError("top_k must be an integer of at least 0 (0 keeps all tokens)")


@dataclass(eq=False, slots=True)
class Row:
    """One output while it is sampled.

    Attributes:
        y: (L, S) int64, the digits so far.
        plan: its events.
        settings: how its tokens are drawn.
        seed: 0..2**64-1.
        next_event: index of the event that comes next.
        failed: the network gave no finite logits for it; it takes no further step.
    """

    y: Tensor
    plan: RevealPlan
    settings: SamplingSettings
    seed: int
    next_event: int = 0
    failed: bool = False

    @property
    def length(self) -> int:
        """Number of tokens L."""
        return len(self.y)

    @property
    def remaining(self) -> int:
        """Denoiser calls left."""
        return 0 if self.failed else self.plan.nfe - self.next_event

    @property
    def done(self) -> bool:
        """Whether the row takes no further step."""
        return self.remaining == 0

    @property
    def event(self) -> Event:
        """The event that comes next."""
        return self.plan.event(self.next_event)


class StepResult(NamedTuple):
    """What one step did to one row.

    Attributes:
        positions: (P,) int64 on the CPU, the tokens of the event.
        digits: (P, S) int64 on the CPU, all their digits after the step. If ``ok`` is False nothing was written,
            and this is no state of the row: some positions may hold draws that were given up. Do not pass it on.
        ok: False if the row failed in this step and was left as it was.
    """

    positions: Tensor
    digits: Tensor
    ok: bool


def new_row(
    canvas: Canvas, schedule: Schedule, settings: SamplingSettings, steps: Steps, seed: int, eps: float = 0.0
) -> Row:
    """Return a row at t = 1 with its reveal plan.

    Raises:
        ValueError: if ``steps``, ``seed`` or ``eps`` is out of range, see `draw_plan`.
    """
    return Row(canvas.y.clone(), draw_plan(canvas.free, schedule, steps, seed, eps), settings, seed)


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
        self._digits = codec.digits.to(self.device)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[StepResult]:
        """Advance every row by its next event.

        Args:
            rows: rows that are not done, each once.

        Returns:
            One result per row, in order.
        """
        if not rows:
            return []
        events = [row.event for row in rows]
        features = self._features(rows, events)
        revealed = self._reveal(features, rows, events)
        return [
            self._write(row, event, y, finite)
            for row, event, y, finite in zip(
                rows,
                events,
                *(part.split([len(e.positions) for e in events]) for part in revealed),
                strict=True,
            )
        ]

    def _features(self, rows: Sequence[Row], events: Sequence[Event]) -> Tensor:
        """Run the trunk once over all rows: features (R, D) of the positions that are due."""
        lengths = [row.length for row in rows]
        starts = [sum(lengths[:index]) for index in range(len(rows))]
        fill = _fill_lengths(lengths)
        masked = torch.full((sum(fill), self.codec.target_length), self.codec.mask_index, device=self.device)
        y_t = torch.cat([*(row.y.to(self.device) for row in rows), masked])
        t = torch.tensor(
            [event.t for event in events] + [1.0] * len(fill), dtype=torch.float64, device=self.device
        )
        positions = torch.cat([event.positions + start for event, start in zip(events, starts, strict=True)])
        # Filled up with position 0, whose features are dropped: networks may have products over these rows too.
        asked = F.pad(positions, (0, filled_size(len(positions)) - len(positions)))
        return self.denoiser.features(y_t, lengths + fill, t, asked.to(self.device))[: len(positions)]

    def _reveal(self, features: Tensor, rows: Sequence[Row], events: Sequence[Event]) -> Revealed:
        """Draw one token per gathered position: digits (R, S) and finite (R,), both on the CPU."""
        counts = torch.tensor([len(event.positions) for event in events])
        due = torch.cat([event.due for event in events])
        # Every digit is revealed once, so the lowest one of an event numbers the draws of a token.
        lowest_due = due.int().argmax(-1)
        seeds = torch.tensor([seed_words(row.seed) for row in rows]).repeat_interleave(counts, 0)
        u = uniform(seeds, torch.cat([event.positions for event in events]), lowest_due, Purpose.DRAW)
        settings = [row.settings for row in rows]
        temperature = torch.tensor([s.temperature for s in settings]).repeat_interleave(counts)
        top_k = torch.tensor([min(s.top_k, self.codec.vocab_size) for s in settings]).repeat_interleave(
            counts
        )
        top_p = torch.tensor([s.top_p for s in settings]).repeat_interleave(counts)
        y = torch.cat(
            [row.y[event.positions.to(row.y.device)] for row, event in zip(rows, events, strict=True)]
        )
        per_position = (y, due, u, temperature, top_k, top_p)
        chunks = zip(
            features.split(MAX_LOGIT_ROWS),
            *(part.split(MAX_LOGIT_ROWS) for part in per_position),
            strict=True,
        )
        drawn = [self._reveal_chunk(*chunk) for chunk in chunks]
        return Revealed(
            torch.cat([part.y for part in drawn]).cpu(), torch.cat([part.finite for part in drawn]).cpu()
        )

    def _reveal_chunk(
        self,
        features: Tensor,
        y: Tensor,
        due: Tensor,
        u: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
    ) -> Revealed:
        """Draw the tokens of one chunk of positions: digits (R, S) and finite (R,).

        Args:
            features: (R, D) on the device; the rest may lie elsewhere.
            y: (R, S) int64 digits before the draw.
            due: (R, S) bool.
            u: (R,) float64.
            temperature: (R,) float32.
            top_k: (R,) int64.
            top_p: (R,) float32.
        """
        num_rows = len(features)
        logits = self.denoiser.head(F.pad(features, (0, 0, 0, filled_size(num_rows) - num_rows)))[:num_rows]
        y, due, u, temperature, top_k, top_p = (
            part.to(self.device) for part in (y, due, u, temperature, top_k, top_p)
        )
        return reveal_tokens(
            logits, y, due, self._digits, u, temperature, top_k, top_p, mask_index=self.codec.mask_index
        )

    def _write(self, row: Row, event: Event, y: Tensor, finite: Tensor) -> StepResult:
        """Write the drawn digits (P, S) of one row and move it on, or mark it failed and leave it as it was."""
        ok = bool(finite.all())
        if ok:
            row.y[event.positions.to(row.y.device)] = y.to(row.y.device)
            row.next_event += 1
        else:
            row.failed = True
        return StepResult(event.positions, y, ok)


def _fill_lengths(lengths: Sequence[int]) -> list[int]:
    """Lengths of masked rows that fill a call up to `filled_size`, none longer than the longest row."""
    num_tokens, longest = sum(lengths), max(lengths)
    whole, rest = divmod(filled_size(num_tokens) - num_tokens, longest)
    return [longest] * whole + [rest] * (rest > 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
