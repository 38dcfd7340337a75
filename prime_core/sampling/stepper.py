"""One denoiser call for any rows at any steps.

The stepper is the only place that calls the denoiser in sampling and scoring; the offline loop and the server both
drive it. Rows of different lengths, grids and settings are packed end to end and filled up to one of a few sizes
(`Denoiser.fill`), the output head runs only where something is revealed, and a row's result does not depend on its
neighbours. Rows that are scored (`prime_core.scoring.score_row`) share calls with rows that are sampled: to the trunk
they are the same, and only what is made of their logits differs.

Shapes: B rows, L tokens of a row, T packed tokens, S digits a token, V tokens of the vocabulary, R positions of the
events of one kind of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.token_digits import TokenDigits
from kernels.transfers import queued
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser, device_of, filled_size
from prime_core.sampling.row import Row
from prime_core.sampling.step_parts import Part, StepResult, parts_of
from prime_core.scoring.score_row import ScoreRow

AnyRow = Row | ScoreRow

# Logits exist for at most this many positions at a time (50 MB at V = 50257). On a GPU launches cost more than memory;
# from 1,024 positions on the head of images computes whole pictures.
MAX_LOGIT_ROWS = 256
MAX_LOGIT_ROWS_ON_GPU = 960


def max_logit_rows(device: torch.device) -> int:
    """Return for how many positions logits may exist at a time."""
    return MAX_LOGIT_ROWS if device.type == "cpu" else MAX_LOGIT_ROWS_ON_GPU


class QueuedCall:
    """A denoiser call whose results may not be there yet.

    Attributes:
        rows: that take part.
    """

    def __init__(self, rows: Sequence[AnyRow], parts: Sequence[Part[Any]]) -> None:
        """Keep what results are made of.

        Args:
            rows: in the order of the results.
            parts: that have moved.
        """
        self.rows = rows
        self._parts = parts

    def results(self) -> list[StepResult]:
        """Wait for the call, and return one result per row, in order; to be asked for once."""
        results = {
            row: result for part in self._parts for row, result in zip(part.rows, part.results(), strict=True)
        }
        return [results[row] for row in self.rows]


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
        self._digits = TokenDigits(codec.digits_on(self.device), codec.mask_index)

    def step(self, rows: Sequence[AnyRow]) -> list[StepResult]:
        """Advance every row by its next event. If the call cannot be made, no row has moved.

        The digits of rows move to where the network is, and stay there.

        Args:
            rows: rows that are not done, each once; all have a label, or none has.

        Returns:
            One result per row, in order.
        """
        return self.queue(rows).results()

    @torch.inference_mode()
    def queue(self, rows: Sequence[AnyRow]) -> QueuedCall:
        """Begin a step: on a GPU its work is queued, and nothing is waited for. If anything raises, no row has moved.

        The rows have moved on when this returns, and may take part in further calls at once. Results must be asked for
        call by call in the order of these calls: only then is it known which rows failed.

        Args:
            rows: as those of `step`.
        """
        if not rows:
            return QueuedCall(rows, [])
        parts = parts_of(rows, max_logit_rows(self.device))
        laid_out = [row for part in parts for row in part.rows]
        fill = self.denoiser.fill([row.length for row in laid_out])
        y_t = self._states(parts, sum(fill))
        # What goes to a GPU goes before the trunk: later it would be waited for behind the trunk.
        for part in parts:
            part.queue(self.device)
        logits = self._logits(parts, self._features(parts, laid_out, fill, y_t))
        for part in parts:
            part.take(logits, y_t, self._digits)
        for part in parts:
            part.move()
        return QueuedCall(rows, parts)

    def _states(self, parts: Sequence[Part[Any]], num_filled: int) -> Tensor:
        """Return the digits (T, S) that the call sees: a copy of those of the rows, and masked tokens behind them."""
        num_digits, mask_index = self.codec.target_length, self.codec.mask_index
        states, on_cpu = [], self.device.type == "cpu"
        for part in parts:
            for row in part.rows:
                if not (row.y.is_cpu and on_cpu):
                    row.y = queued(row.y, self.device)
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

    def _features(
        self, parts: Sequence[Part[Any]], rows: Sequence[AnyRow], fill: list[int], y_t: Tensor
    ) -> Any:
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

    def _logits(self, parts: Sequence[Part[Any]], features: Any) -> Iterator[Tensor]:
        """Yield the logits (chunk, V) of every chunk of every part."""
        start = 0
        for size in (size for part in parts for size in part.chunks):
            stop = start + filled_size(size)
            yield self.denoiser.head(features[start:stop])[:size]
            start = stop


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
