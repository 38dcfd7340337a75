"""What a denoiser call over rows that are scored is for: the cost of their masked digits.

Shapes: R positions of all rows, P positions of one row, L tokens, S digits a token, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.nll import SubtokenNLL, subtoken_nll
from kernels.token_digits import TokenDigits
from prime_core.models.denoiser import Denoiser, filled_size
from prime_core.plan import Event
from prime_core.score_row import ScoreRow


def score_rows(
    denoiser: Denoiser,
    digits: TokenDigits,
    rows: Sequence[ScoreRow],
    events: Sequence[Event],
    states: Sequence[Tensor],
    features: Any,
    chunks: Sequence[int],
) -> list[bool]:
    """Let every row count what its event costs.

    The head is the one that sampling uses, over chunks of the same sizes, so that a row's numbers do not depend on its
    neighbours (the grouping of `kernels.linear_nll` would make them).

    Args:
        denoiser: gives the head.
        digits: of every token, where the network is.
        rows: what is scored.
        events: of the rows.
        states: (L, S) each, what the call saw of the rows.
        features: of the events' positions (R), each chunk of them filled up to `filled_size`.
        chunks: positions whose logits exist at a time; they sum to R.

    Returns:
        For every row whether the costs are finite; where not, it has failed.
    """
    device = digits.table.device
    y_t = torch.cat([y[e.positions] for y, e in zip(states, events, strict=True)]).to(device)
    x_0 = torch.cat([row.x_0[e.positions] for row, e in zip(rows, events, strict=True)]).to(device)
    start, parts = 0, []
    for size, y, x in zip(chunks, y_t.split(chunks), x_0.split(chunks), strict=True):
        logits = denoiser.head(features[start : start + filled_size(size)])[:size]
        parts.append(subtoken_nll(logits, y, x, digits.table, digits.mask_index))
        start += filled_size(size)
    nll = [torch.cat(part).cpu() for part in zip(*parts, strict=True)]
    sizes = [len(event.positions) for event in events]
    of_rows = zip(*(part.split(sizes) for part in nll), strict=True)
    return [
        row.record(event.positions, SubtokenNLL(*own))
        for row, event, own in zip(rows, events, of_rows, strict=True)
    ]
