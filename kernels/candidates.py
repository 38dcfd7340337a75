"""Rows that share a visible digit share their candidates: the tokens that carry-over leaves them.

A row with digit j visible can only be one of the V / b tokens with that digit, so the output head need not be
computed for the others. Rows are grouped by one visible digit each; the rest of the carry-over filter works inside
the group.

Shapes: R rows (one token position each), V tokens, S digits a token, b = base.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Rows that are worked on together.

    Attributes:
        rows: (G,) int64 or a slice, indices into R.
        tokens: (C,) int64 ascending or a slice, the tokens that these rows may be; indices into V.
    """

    rows: Tensor | slice
    tokens: Tensor | slice


def all_candidates(num_rows: int, chunk_rows: int) -> list[Group]:
    """Return chunks of rows, each of which may be any token."""
    return [
        Group(slice(first, min(first + chunk_rows, num_rows)), slice(None))
        for first in range(0, num_rows, chunk_rows)
    ]


def group_by_visible_digit(
    y_t: Tensor, y_0: Tensor, digits: Tensor, mask_index: int, chunk_rows: int
) -> list[Group]:
    """Group rows by their first visible digit; rows without one, and rows alone with theirs, may be any token.

    Reads on the host how large the groups are, so it is for tensors on a CPU.

    Args:
        y_t: (R, S) int64, partly masked digits.
        y_0: (R, S) int64, the digits of the tokens whose likelihood is asked for. A visible digit that contradicts
            them is not used, so that these tokens are always among the candidates.
        digits: (V, S) int64, the digits of every token.
        mask_index: b.
        chunk_rows: most rows of a group.

    Returns:
        Groups that hold every row once.
    """
    num_digits = digits.shape[1]
    usable = (y_t != mask_index) & (y_t == y_0)
    place = (usable * torch.arange(num_digits, 0, -1)).argmax(1)
    value = y_t.gather(1, place[:, None])[:, 0]
    key = torch.where(usable.any(1), place * mask_index + value, -1)
    _, inverse, counts = key.unique(return_inverse=True, return_counts=True)
    key = torch.where(counts[inverse] > 1, key, -1)  # copying the head's rows does not pay for one row
    order = key.argsort(stable=True)
    keys, counts = key.unique(return_counts=True)
    by_digit = [column.argsort(stable=True) for column in digits.T]
    ends = [column.bincount(minlength=mask_index).cumsum(0).tolist() for column in digits.T]
    groups = []
    for each, rows in zip(keys.tolist(), order.split(counts.tolist()), strict=True):
        tokens: Tensor | slice = slice(None)
        if each >= 0:
            j, v = divmod(each, mask_index)
            tokens = _run(by_digit[j][ends[j][v - 1] if v else 0 : ends[j][v]])
        groups += [Group(part, tokens) for part in rows.split(chunk_rows)]
    return groups


def _run(tokens: Tensor) -> Tensor | slice:
    """Return ascending tokens as a slice if they follow each other: a view of the head instead of a copy."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens
