"""The published ancestral sampler of masked diffusion text models: the baseline to compare with.

MDM-Prime (arXiv 2505.18495) samples text with the cached ancestral sampler of MDLM (arXiv 2406.07524), on
digits. Every step of the grid handles every position of every row: full logits, carry-over filter, softmax
and a draw over the vocabulary in float64 (float32 noise truncates rare tokens: arXiv 2409.02908), then each
masked digit takes its new value with probability (alpha_s - alpha_t) / (1 - alpha_t). The network is called
again unless NOTHING changed in the WHOLE batch; with many rows something always does.

It is as fast as that algorithm allows: one shared filter table instead of one per row; the float64 work
allocates nothing per step and goes through blocks of positions, on a CPU small ones that stay in the processor's
cache, on a GPU as large as a bound on memory allows; no logarithm of the probabilities. Unlike the published code
it makes no last call when nothing is left masked.

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
# On a GPU a block's buffers may take so much: 3,560 positions at V = 50257, so that a launch costs next to nothing.
GPU_BLOCK_BYTES = 2 * 2**30
# float64 noise, a float32 row of the filter table
_BYTES_PER_ENTRY = 12


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
        self.device = device_of(denoiser)
        self._digits = codec.digits.to(self.device)
        self._make_buffers()

    @property
    def num_positions(self) -> int:
        """Positions Q of the whole batch."""
        return self.num_rows * self.length

    @property
    def digits_shape(self) -> tuple[int, int, int]:
        """(B, L, S)."""
        return self.num_rows, self.length, self.codec.target_length

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
        y = torch.full(self.digits_shape, self.codec.mask_index, device=self.device)
        num_calls, is_stale = 0, True
        for t, probability in zip(times.tolist(), self.reveal_chances(num_steps), strict=False):
            num_calls += is_stale
            y_next = self.step(y, t, probability, generator, call=is_stale)
            is_stale = not self.time_free or not torch.equal(y_next, y)
            y = y_next
        masked = y.eq(self.codec.mask_index)
        if masked.any():  # noise removal
            num_calls += is_stale
            y = self.step(y, self.eps, 1.0, generator, call=is_stale)
        return DenseSamples(y, num_calls)

    def reveal_chances(self, num_steps: int) -> list[float]:
        """Return with which probability a masked digit is revealed in each of N steps."""
        alpha = self.schedule.alpha_t(self.schedule.time_grid(num_steps, self.eps))
        chances: list[float] = ((alpha[1:] - alpha[:-1]) / (1 - alpha[:-1])).tolist()
        return chances

    @torch.inference_mode()
    def step(
        self, y: Tensor, t: float, probability: float, generator: torch.Generator, *, call: bool
    ) -> Tensor:
        """Take one step of the grid and return the digits after it.

        Args:
            y: (B, L, S) int64.
            t: noise time of the step.
            probability: with which a masked digit takes its new value.
            generator: noise.
            call: whether the network is called; if not, tokens are drawn from the result of the last call.
        """
        drawn = self._draw(y, self._logits(y, t) if call else None, generator)
        masked = y.eq(self.codec.mask_index)
        if probability < 1:
            chance = torch.rand(y.shape, dtype=torch.float64, device=y.device, generator=generator)
            masked &= chance < probability
        return torch.where(masked, drawn, y)

    def _make_buffers(self) -> None:
        vocab_size, device = self.codec.vocab_size, self.device
        self._block = block_positions(device, self.num_positions, vocab_size)
        # One digit a token: a masked position shows nothing that could rule a token out.
        has_filter = self.codec.target_length > 1
        self._penalties = carry_over_penalties(self.codec).to(device) if has_filter else None
        self._probabilities = torch.empty(self.num_positions, vocab_size, dtype=torch.float64, device=device)
        self._noise = torch.empty(self._block, vocab_size, dtype=torch.float64, device=device)
        self._penalty = torch.empty(self._block, vocab_size, device=device)

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
        tokens = torch.empty(self.num_positions, dtype=torch.int64, device=y.device)
        for start in range(0, self.num_positions, self._block):
            block = slice(start, min(start + self._block, self.num_positions))
            probabilities = self._probabilities[block]
            if logits is not None:
                scores = self._filter(logits[block], y.flatten(0, 1)[block])
                torch.softmax(scores, -1, dtype=torch.float64, out=probabilities)
            noise = self._noise[: len(probabilities)]
            race(probabilities, noise, generator, out=tokens[block])
        return self._digits[tokens].view(self.digits_shape)

    def _filter(self, logits: Tensor, y: Tensor) -> Tensor:
        """Set the logits of tokens that contradict the visible digits y to -inf, in place."""
        if self._penalties is None:
            return logits
        penalty = self._penalty[: len(logits)]
        for digit, table in enumerate(self._penalties):
            logits.add_(torch.index_select(table, 0, y[:, digit], out=penalty))
        return logits


def race(probabilities: Tensor, noise: Tensor, generator: torch.Generator, *, out: Tensor) -> None:
    """Draw one index per row of ``probabilities`` (R, V) float64 into ``out`` (R,); ``noise`` (R, V) is overwritten."""
    noise.uniform_(generator=generator).log_()
    torch.argmin(torch.div(probabilities, noise, out=noise), -1, out=out)


def block_positions(device: torch.device, num_positions: int, vocab_size: int) -> int:
    """Return how many positions the float64 work handles at a time."""
    if device.type == "cpu":
        return BLOCK_POSITIONS
    return max(1, min(num_positions, GPU_BLOCK_BYTES // (vocab_size * _BYTES_PER_ENTRY)))


def carry_over_penalties(codec: SubtokenCodec) -> Tensor:
    """Return (S, b + 1, V) float32: 0 where token x has value v as digit j or v is the mask, else -inf."""
    values = torch.arange(codec.base + 1)
    agrees = codec.digits.T[:, None, :] == values[None, :, None]
    agrees[:, codec.mask_index] = True
    return torch.zeros(agrees.shape).masked_fill_(~agrees, -torch.inf)
