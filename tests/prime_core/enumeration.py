"""All sets of masked digits of a row, and their weights in the objectives."""

import itertools
import math

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec


def all_masks(codec: SubtokenCodec, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Mask a row (L,) in every way but the empty one: y_t (A, L, S) and how many digits are masked (A,)."""
    y_0 = codec.encode(x_0)
    masked = torch.tensor(list(itertools.product((False, True), repeat=y_0.numel()))[1:])
    y_t = torch.where(masked.view(-1, *y_0.shape), codec.mask_index, y_0)
    return y_t, masked.sum(1)


def mask_weights(counts: Tensor, num_digits: int) -> Tensor:
    """Weight of a set of n of M masked digits, int_0^1 v^(n-1) (1-v)^(M-n) dv = 1 / (n C(M, n)): (A,) float64."""
    return torch.tensor([1 / (n * math.comb(num_digits, n)) for n in counts.tolist()], dtype=torch.float64)
