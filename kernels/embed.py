"""Intermediate-state embedding: the digit embeddings of a partly masked token, concatenated."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def embed_subtokens(y_t: Tensor, table: Tensor) -> Tensor:
    """Embed every digit (or mask) and concatenate the digits of a token (MDM-Prime, section 3.3).

    Args:
        y_t: (..., S) integers in 0..b, b = masked.
        table: (b + 1, D / S), one row per digit value and one for the mask.

    Returns:
        (..., D) in the dtype of ``table``.
    """
    return F.embedding(y_t, table).flatten(-2)
