"""The forward process: noise times and independently masked sub-tokens.

Shapes: B rows, L tokens a row, S digits a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def antithetic_times(num_rows: int, generator: torch.Generator, eps: float = 1e-3) -> Tensor:
    """Draw noise times that are evenly spread over [eps, 1], one in each of B equal strata (MDLM, appendix C).

    One shift is common to all rows, so row i is uniform on stratum i, NOT on the whole range; a time of a row
    picked at random is uniform on the whole range.

    Args:
        num_rows: B.
        generator: source of the one uniform number on [0, 1) that shifts the even grid.
        eps: smallest time, in [0, 1).

    Returns:
        (B,) float32, ascending; row i lies in stratum i, [eps + (1 - eps) i / B, eps + (1 - eps) (i + 1) / B].
        The upper ends belong to it because float32 may round up to them, so the last time can be 1.
    """
    shift = torch.rand((), generator=generator)
    strata = (torch.arange(num_rows) + shift) / num_rows
    return eps + (1 - eps) * strata


def mask_subtokens(y_0: Tensor, alpha_t: Tensor, uniforms: Tensor, mask_index: int) -> Tensor:
    """Mask every sub-token independently with probability 1 - alpha_t (MDM-Prime, eq. 4).

    Args:
        y_0: (B, L, S) clean digits.
        alpha_t: (B,) probability of staying visible.
        uniforms: (B, L, S) uniform on [0, 1).
        mask_index: the symbol "masked".

    Returns:
        y_t (B, L, S), dtype of y_0.
    """
    return torch.where(uniforms < alpha_t[:, None, None], y_0, torch.full_like(y_0, mask_index))
