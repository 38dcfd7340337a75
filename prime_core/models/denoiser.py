"""What every network offers to samplers and objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.linear_nll import LinearHead

# CPU matrix products take another path for few rows, whose results differ in the last bit; from 16 rows on every
# row's result is the same in any batch. Smaller products are filled up where a row must not feel its neighbours.
MIN_GEMM_ROWS = 16


def filled_size(num_rows: int) -> int:
    """Return how many rows a matrix product is filled up to: at least 16, and one of eight sizes an octave.

    oneDNN keeps a compiled kernel and a buffer for every shape it has met (megabytes each), so a server that ran
    each number of packed tokens as it comes would grow without end. The filling is below 16 rows, or at most an
    eighth of the given ones.

    Args:
        num_rows: at least 1.
    """
    step = max(MIN_GEMM_ROWS, 1 << num_rows.bit_length() >> 4)
    return -(-num_rows // step) * step


class Denoiser(Protocol):
    """Partly masked digits -> logits of p_theta(x_i | y_t) over whole tokens, before any carry-over filter.

    The trunk (`features`) and the output head (`head`) are apart, so that logits exist only where they are
    used. What goes from one to the other is the network's own: something with ``len``, ``split`` and slices over R
    positions, as a tensor (R, D) has them.
    """

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Run the trunk over packed rows.

        Args:
            y_t: (T, S) int64, the rows laid end to end.
            lengths: tokens of each row.
            t: (B,) noise time of each row; time-free networks ignore it.
            positions: (R,) indices into T, on any device; on the CPU they cost a GPU no synchronisation. None for all.
            labels: (B,) int64, the label of each row; None for networks without labels, which refuse them.

        Returns:
            The features of R positions.
        """
        ...

    def head(self, features: Any) -> Tensor:
        """Map features of R positions to logits (R, V) float32."""
        ...

    @property
    def linear_head(self) -> LinearHead | None:
        """The head, where it is one linear map of features (R, D); None where it is not.

        Objectives fuse such a head with the log-likelihood (`kernels.linear_nll`) and call `head` of the others.
        """
        ...

    def fill(self, lengths: Sequence[int]) -> list[int]:
        """Return the lengths of masked rows with which a call over rows of these lengths is filled up.

        Results do not depend on them; they bound the number of shapes that a server's calls have.
        """
        ...

    def __call__(self, y_t: Tensor, t: Tensor | None = None) -> Tensor:
        """Map y_t (B, L, S) to logits (B, L, V) float32; images (B, C, H, W, S) to (B, C, H, W, V)."""
        ...


def device_of(denoiser: Denoiser) -> torch.device:
    """Return the device of a network's weights; the CPU for one without weights."""
    if isinstance(denoiser, nn.Module):
        for parameter in denoiser.parameters():
            return parameter.device
    return torch.device("cpu")
