"""The published ancestral sampler of masked diffusion text models: the baseline to compare with.

MDM-Prime (arXiv 2505.18495) samples text with the cached ancestral sampler of MDLM (arXiv 2406.07524), on
digits. Every step of the grid handles every position of every row: full logits, carry-over filter, softmax
and a draw over the vocabulary in float64 (float32 noise truncates rare tokens: arXiv 2409.02908), then each
masked digit takes its new value with probability (alpha_s - alpha_t) / (1 - alpha_t). The network is called
again unless NOTHING changed in the WHOLE batch; with many rows something always does.

It is as fast as that algorithm allows: one shared filter table instead of one per row; the float64 work
allocates nothing per step and goes through blocks of positions that stay in the processor's cache; no
logarithm of the probabilities. Unlike the published code it makes no last call when nothing is left masked.

Shapes: B rows, L tokens a row, Q = B L positions, S digits a token, V tokens, b = base.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser, device_of
from prime_core.schedule import Schedule

# End of the published grid; what is still masked there is filled in by one more call.
PUBLISHED_EPS = 1e-5
# Positions whose float64 work is done together: 6 MB at V = 50257, about what a processor's cache holds.
BLOCK_POSITIONS = 16


class DenseSamples(NamedTuple):
    """What the sampler returns.

    Attributes:
        y: (B, L, S) int64, all digits visible.
        num_calls: denoiser calls; each holds all B rows.
    """

    y: Tensor
    num_calls: int


class DensePublished:
    """The published sampler for batches of one shape; its float64 buffers are made once."""

    def __init__(
        self,
        denoiser: Denoiser,
        codec: SubtokenCodec,
        schedule: Schedule,
        *,
        num_rows: int,
        length: int,
        time_free: bool = True,
        eps: float = PUBLISHED_EPS,
    ) -> None:
        """Make the buffers.

        Args:
            denoiser: network in evaluation mode.
            codec: tokens to digits.
            schedule: noise schedule.
            num_rows: B.
            length: L.
            time_free: the network ignores t, so its result can be kept while the digits stay the same.
            eps: end of the time grid, in [0, 1).

        Raises:
            ValueError: if ``num_rows`` or ``length`` is below 1.
        """
        if num_rows < 1 or length < 1:
            raise ValueError(f"num_rows and length must be at least 1, got {num_rows} and {length}")
        self.denoiser, self.codec, self.schedule = denoiser, codec, schedule
        self.num_rows, self.length, self.time_free, self.eps = num_rows, length, time_free, eps
        device = device_of(denoiser)
        self._digits = codec.digits.to(device)
        self._penalties = carry_over_penalties(codec).to(device)
        self._probabilities = torch.empty(
            num_rows * length, codec.vocab_size, dtype=torch.float64, device=device
        )
        self._noise = torch.empty(BLOCK_POSITIONS, codec.vocab_size, dtype=torch.float64, device=device)
        self._penalty = torch.empty(BLOCK_POSITIONS, codec.vocab_size, device=device)

    @torch.inference_mode()
    def sample(self, num_steps: int, generator: torch.Generator) -> DenseSamples:
        """Sample B rows unconditionally.

        Args:
            num_steps: steps N of the grid, at least 1.
            generator: noise, on the device of the network.

        Raises:
            ValueError: if ``num_steps`` is out of range.
        """
        times = self.schedule.time_grid(num_steps, self.eps)
        alpha = self.schedule.alpha_t(times)
        reveal = ((alpha[1:] - alpha[:-1]) / (1 - alpha[:-1])).tolist()
        shape = (self.num_rows, self.length, self.codec.target_length)
        y = torch.full(shape, self.codec.mask_index, device=self._digits.device)
        num_calls, is_stale = 0, True
        for t, probability in zip(times.tolist(), reveal, strict=False):
            num_calls += is_stale
            drawn = self._draw(y, self._logits(y, t) if is_stale else None, generator)
            chance = torch.rand(shape, dtype=torch.float64, device=y.device, generator=generator)
            y_next = torch.where(y.eq(self.codec.mask_index) & (chance < probability), drawn, y)
            is_stale = not self.time_free or not torch.equal(y_next, y)
            y = y_next
        masked = y.eq(self.codec.mask_index)
        if masked.any():  # noise removal
            num_calls += is_stale
            drawn = self._draw(y, self._logits(y, self.eps) if is_stale else None, generator)
            y = torch.where(masked, drawn, y)
        return DenseSamples(y, num_calls)

    def _logits(self, y: Tensor, t: float) -> Tensor:
        """One denoiser call: logits (Q, V) float32 of every position."""
        times = torch.full((self.num_rows,), t, dtype=torch.float64, device=y.device)
        logits: Tensor = self.denoiser(y, times).flatten(0, 1)
        return logits

    def _draw(self, y: Tensor, logits: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draw a token at every position and return its digits (B, L, S).

        An exponential race: with u uniform, argmax p / -log(u) has law p. Here it is argmin p / log(u): u
        lies in [0, 1) in steps of 2^-53, so log(u) is never 0 and no quotient is NaN.

        Args:
            y: (B, L, S) int64.
            logits: (Q, V) float32, overwritten; None draws again from the probabilities of the last call.
            generator: noise.
        """
        num_positions = self.num_rows * self.length
        tokens = torch.empty(num_positions, dtype=torch.int64, device=y.device)
        for start in range(0, num_positions, BLOCK_POSITIONS):
            block = slice(start, min(start + BLOCK_POSITIONS, num_positions))
            probabilities = self._probabilities[block]
            if logits is not None:
                scores = self._filter(logits[block], y.flatten(0, 1)[block])
                torch.softmax(scores, -1, dtype=torch.float64, out=probabilities)
            noise = self._noise[: len(probabilities)]
            torch.rand(noise.shape, dtype=torch.float64, generator=generator, out=noise).log_()
            torch.argmin(torch.div(probabilities, noise, out=noise), -1, out=tokens[block])
        digits = self._digits[tokens]
        return digits.view(self.num_rows, self.length, -1)

    def _filter(self, logits: Tensor, y: Tensor) -> Tensor:
        """Set the logits of tokens that contradict the visible digits y to -inf, in place."""
        penalty = self._penalty[: len(logits)]
        for digit, table in enumerate(self._penalties):
            logits.add_(torch.index_select(table, 0, y[:, digit], out=penalty))
        return logits


def carry_over_penalties(codec: SubtokenCodec) -> Tensor:
    """Return (S, b + 1, V) float32: 0 where token x has value v as digit j or v is the mask, else -inf."""
    values = torch.arange(codec.base + 1)
    agrees = codec.digits.T[:, None, :] == values[None, :, None]
    agrees[:, codec.mask_index] = True
    return torch.zeros(agrees.shape).masked_fill_(~agrees, -torch.inf)
