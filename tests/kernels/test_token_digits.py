"""Digits packed into one number: the widest that fit, and those that do not."""

from __future__ import annotations

import pytest
import torch

from kernels.token_digits import TokenDigits


def test_digits_that_fit_into_no_number_are_refused() -> None:
    assert TokenDigits(torch.full((2, 31), 3), 4).packed.tolist() == [2**62 - 1] * 2
    with pytest.raises(ValueError, match="32 digits of 2 bits do not fit into 62 bits"):
        TokenDigits(torch.full((2, 32), 3), 4)
