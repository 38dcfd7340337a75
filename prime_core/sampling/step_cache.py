"""Step cache: a row whose digits did not change since its last denoiser call keeps the result of that call.

For samplers whose steps depend on values, so that no plan can tell beforehand which rows change
(`prime_core.sampling.plan` is less work where it can). Every row is compared on its own, on the device; the rows that
changed are compacted into a smaller batch. One comparison over the whole batch would find that nearly every step
changes something somewhere.

The size of the smaller batch is the only thing the host has to know. On a CPU counting is free, and a call has exactly
the rows that changed. On CUDA one number is copied to the host asynchronously while work that does not depend on it is
queued, and the batch is filled up to a power of two: few shapes, each of which a CUDA graph may be captured for. (The
other way, a call over the whole batch in every step without ever waiting, would save nothing of the trunk.)

Results are kept as the trunk gives them, features and not logits: a tensor of B x L x V never exists.

Shapes: B rows of L tokens each, S digits a token, D features, R positions of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.rows import CompactedRows, compact_rows, gather_rows, scatter_rows
from prime_core.models.denoiser import Denoiser
from prime_core.models.dit import DiT
from prime_core.models.unet import PixelFeatures, UNet


class StepCache:
    """The latest trunk result of every row of a batch.

    A step is `begin`, which only queues work, then `finish` with the number that `begin` gave, then `features`:

        num_changed = cache.begin(y)
        ...  # queue what does not depend on it
        cache.finish(*HostCopy(num_changed).wait().tolist())
        logits = denoiser.head(cache.features(positions))

    Attributes:
        row_evaluations: rows that were evaluated so far, those that fill up a call not counted.
        num_calls: denoiser calls so far.
    """

    def __init__(self, denoiser: Denoiser, mask_index: int, labels: Tensor | None = None) -> None:
        """Start without results.

        Args:
            denoiser: network in evaluation mode.
            mask_index: b.
            labels: (B,) int64, the label of each row; None for networks without labels.

        Raises:
            ValueError: if the network is time-conditioned: its result changes with t though no digit does.
        """
        if isinstance(denoiser, DiT | UNet) and denoiser.config.time_conditioned:
            raise ValueError("a step cache needs a time-free model: results of this one change with t")
        self.denoiser = denoiser
        self.row_evaluations = 0
        self.num_calls = 0
        self._mask_index = mask_index
        self._labels = labels
        self._seen: Tensor | None = None
        self._results: Tensor | None = None
        self._queued: tuple[Tensor, CompactedRows] | None = None

    def begin(self, y: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Find the rows whose results are out of date.

        Args:
            y: (B, L, S) int64, the digits of all rows; not to be changed before `finish`.
            wanted: (B,) bool, the rows whose results will be asked for; None for all. The others stay out of date
                until they are wanted.

        Returns:
            (1,) int64 on the device: how many wanted rows changed since their last evaluation.
        """
        if self._seen is None:
            self._seen = torch.full_like(y, -1)  # no digit: every row counts as changed
        changed = (y != self._seen).flatten(1).any(1)
        rows = compact_rows(changed if wanted is None else changed & wanted)
        self._queued = y, rows
        return rows.num_changed

    def finish(self, num_changed: int) -> None:
        """Evaluate the rows that `begin` found, in one call, or in none if there are none.

        Args:
            num_changed: the number that `begin` gave, on the host.
        """
        assert self._queued is not None and self._seen is not None, "begin comes before finish"
        y, rows = self._queued
        self._queued = None
        if num_changed == 0:
            return
        size = bucket_size(num_changed, len(y), y.device)
        digits = gather_rows(y, *rows, y.new_full((size, *y.shape[1:]), self._mask_index))
        scatter_rows(digits, *rows, self._seen)
        results = self._evaluate(digits, self._gathered_labels(rows, size))
        if self._results is None:
            self._results = results.new_zeros(len(y), *results.shape[1:])
        scatter_rows(results, *rows, self._results)
        self.row_evaluations += num_changed
        self.num_calls += 1

    def features(self, positions: Tensor) -> Any:
        """Return the features of R positions for the network's head.

        Args:
            positions: (R,) int64 in 0..B L - 1, positions of the rows laid end to end.
        """
        assert self._results is not None, "nothing was evaluated yet"
        if isinstance(self.denoiser, UNet):
            return PixelFeatures(self._results.permute(0, 3, 1, 2), None, positions)
        return self._results.flatten(0, 1)[positions]

    def _evaluate(self, digits: Tensor, labels: Tensor | None) -> Tensor:
        """Run the trunk on rows (B', L, S), filled up as the network wants it; one result per row."""
        num_rows, length, num_digits = digits.shape
        fill = self.denoiser.fill([length] * num_rows)
        y_t = torch.cat([digits.flatten(0, 1), digits.new_full((sum(fill), num_digits), self._mask_index)])
        if labels is not None:
            labels = torch.cat([labels, labels.new_zeros(len(fill))])
        features = self.denoiser.features(y_t, [length] * num_rows + fill, labels=labels)
        if isinstance(features, PixelFeatures):
            # The features of a pixel side by side, as the head gathers them and CUDA computes them.
            return features.map[:num_rows].permute(0, 2, 3, 1).contiguous()
        tokens: Tensor = features[: num_rows * length]
        return tokens.reshape(num_rows, length, -1)

    def _gathered_labels(self, rows: CompactedRows, size: int) -> Tensor | None:
        if self._labels is None:
            return None
        return gather_rows(self._labels, *rows, self._labels.new_zeros(size))


def bucket_size(num_changed: int, num_rows: int, device: torch.device) -> int:
    """Return the number of rows of a call: exact on a CPU, on CUDA the next power of two or the whole batch.

    Args:
        num_changed: rows to evaluate, at least 1.
        num_rows: rows of the whole batch.
        device: where they are evaluated.
    """
    if device.type == "cpu":
        return num_changed
    return min(num_rows, 1 << (num_changed - 1).bit_length())
