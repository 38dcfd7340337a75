"""The published sampler of masked diffusion images: the baseline to compare with.

Every step of the grid calls the network for every picture and takes full logits at every position. Each digit is
drawn alone, from its own marginal law under the softmax of the logits, whatever is visible ("carry-over" of the
published image models: see `kernels.marginal`), in float64; then each masked digit takes its new value with
probability (alpha_s - alpha_t) / (1 - alpha_t). Unlike the text sampler it keeps no result from step to step.

It is as fast as that algorithm allows: the marginals are sums over axes of the softmax, seen as (b, ..., b); nothing
float64 is allocated per step; blocks of positions as in `dense_published`.

Shapes: B pictures, C planes, H and W high and wide, L = C H W, Q = B L positions, S digits, V = b^S tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from benchmarks.dense_published import GPU_BLOCK_BYTES, DensePublished, race
from prime_core.codec import SubtokenCodec
from prime_core.models.unet import UNet
from prime_core.schedule import Schedule

# Positions whose float64 work is done together: 1 MB at V = 256.
BLOCK_POSITIONS = 512


class DenseImages(DensePublished):
    """The published image sampler for batches of one shape."""

    def __init__(
        self,
        denoiser: UNet,
        codec: SubtokenCodec,
        schedule: Schedule,
        *,
        num_rows: int,
        length: int,
        labels: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Make the buffers.

        Args:
            denoiser: network in evaluation mode.
            codec: values of pixels to digits, every code a value.
            schedule: noise schedule.
            num_rows: B.
            length: L.
            labels: (B,) int64, for networks with labels.
            eps: end of the time grid, in [0, 1).

        Raises:
            ValueError: if some combinations of digits stand for no token, or a size is below 1.
        """
        if codec.base**codec.target_length != codec.vocab_size or codec.permutation is not None:
            raise ValueError(
                "digits cannot be drawn alone: every code must be a token, in the order of the codes"
            )
        super().__init__(
            denoiser, codec, schedule, num_rows=num_rows, length=length, time_free=False, eps=eps
        )
        self.labels = None if labels is None else labels.to(self.device)

    def _make_buffers(self) -> None:
        codec, on_cpu = self.codec, self.device.type == "cpu"
        largest = BLOCK_POSITIONS if on_cpu else GPU_BLOCK_BYTES // (16 * codec.vocab_size)
        self._block = min(self.num_positions, largest)
        self._probabilities = torch.empty(
            self._block, codec.vocab_size, dtype=torch.float64, device=self.device
        )
        self._noise = torch.empty(self._block, codec.base, dtype=torch.float64, device=self.device)

    def _logits(self, y: Tensor, t: float) -> Tensor:
        network = cast(UNet, self.denoiser)
        config = network.config
        times = torch.full((self.num_rows,), t, dtype=torch.float64, device=y.device)
        pictures = y.view(self.num_rows, config.channels, config.height, config.width, -1)
        logits: Tensor = network(pictures, times, self.labels)
        return logits.reshape(self.num_positions, -1)

    def _draw(self, y: Tensor, logits: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draw every digit alone at every position: (B, L, S)."""
        assert logits is not None, "the image sampler calls the network in every step"
        num_digits, base = self.codec.target_length, self.codec.base
        drawn = torch.empty(num_digits, self.num_positions, dtype=torch.int64, device=y.device)
        for start in range(0, self.num_positions, self._block):
            block = slice(start, min(start + self._block, self.num_positions))
            tokens = self._probabilities[: block.stop - start]
            torch.softmax(logits[block], -1, dtype=torch.float64, out=tokens)
            codes = tokens.view(-1, *[base] * num_digits)
            noise = self._noise[: len(tokens)]
            for digit in range(num_digits):
                others = [1 + axis for axis in range(num_digits) if axis != digit]
                marginal = codes.sum(others) if others else codes
                race(marginal, noise, generator, out=drawn[digit, block])
        return drawn.T.reshape(self.digits_shape)
