"""All digits of a token in one integer, a field of bits for each digit, the last digit in the lowest bits.

Then "the tokens whose digits agree in some places" is one comparison of integers, whatever the number of digits.

Shapes: S digits a token, b = base.
"""

from __future__ import annotations

import torch
from torch import Tensor


def digit_bits(base: int) -> int:
    """Return how many bits one digit takes."""
    return max(1, (base - 1).bit_length())


def digit_shifts(num_digits: int, base: int, device: torch.device) -> Tensor:
    """Return the lowest bit of every digit: (S,) int64."""
    return torch.arange(num_digits - 1, -1, -1, device=device) * digit_bits(base)


def pack_digits(digits: Tensor, base: int) -> Tensor:
    """Pack the digits of tokens into one integer each.

    Args:
        digits: (..., S) int64 in 0..b-1.
        base: b.

    Returns:
        (...) int16, int32 or int64, the narrowest that has the bits; its sign is one of them.
    """
    num_digits = digits.shape[-1]
    return (digits << digit_shifts(num_digits, base, digits.device)).sum(-1).to(_narrowest(num_digits, base))


def digit_fields(num_digits: int, base: int, device: torch.device) -> Tensor:
    """Return the bits of every digit in a packed integer: (S,), as `pack_digits` lays them out."""
    full = (1 << digit_bits(base)) - 1
    fields = torch.full((num_digits,), full, device=device) << digit_shifts(num_digits, base, device)
    return fields.to(_narrowest(num_digits, base))


def _narrowest(num_digits: int, base: int) -> torch.dtype:
    bits = num_digits * digit_bits(base)
    if bits <= 16:
        return torch.int16
    return torch.int32 if bits <= 32 else torch.int64
