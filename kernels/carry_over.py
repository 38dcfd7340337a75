"""Carry-over: which tokens the visible digits of a partly masked token rule out (MDM-Prime, section 3.3).

Computed from the digits by comparison, one digit plane at a time; no (S, V, b) table exists.

Shapes: R rows (one token position each), V tokens, S digits a token, b = base.
"""

from __future__ import annotations

import torch
from torch import Tensor


def contradicts(y: Tensor, digits: Tensor, mask_index: int) -> Tensor:
    """Return which tokens disagree with the visible digits of each row.

    Args:
        y: (R, S) int64, digits in 0..b-1, or ``mask_index`` where masked.
        digits: (V, S) int64, the digits of every token.
        mask_index: b.

    Returns:
        (R, V) bool.
    """
    result = torch.zeros(len(y), len(digits), dtype=torch.bool, device=y.device)
    narrow = torch.int16 if mask_index < 2**15 else torch.int32  # the comparison is bound by memory traffic
    planes = digits.T.to(narrow).contiguous()
    for digit, plane in enumerate(planes):
        rows = (y[:, digit] != mask_index).nonzero()[:, 0]
        result[rows] |= plane != y[rows, digit, None].to(narrow)
    return result
