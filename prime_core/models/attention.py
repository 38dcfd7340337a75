"""Full attention inside packed rows, and the rotary embedding.

Shapes: B rows of lengths L, T tokens of all rows laid end to end, R query positions, H heads, E features of a head.

Rows of one length are attended together, so a longer neighbour never changes what a row computes and nothing is padded
but the queries of `attend_at`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prime_core.models.denoiser import MIN_GEMM_ROWS


class Rotation(NamedTuple):
    """Rotary angles of every packed token: cos and sin, each (T, E / 2) float32."""

    cos: Tensor
    sin: Tensor


class Packing(NamedTuple):
    """How the rows of a call lie end to end. All of it is where the network is before its first block runs.

    Attributes:
        lengths: tokens of each row; they sum to T.
        groups: for every length, the indices of the tokens of its rows (None for all), and the length.
        rotation: the angles of every token.
        rows: (T,) int64, the row of every token; None where nobody asks for it.
    """

    lengths: Sequence[int]
    groups: Sequence[tuple[Tensor | None, int]]
    rotation: Rotation
    rows: Tensor | None


def pack(lengths: Sequence[int], cos: Tensor, sin: Tensor, *, with_rows: bool) -> Packing:
    """Return how rows of some lengths are packed.

    Args:
        lengths: tokens of each row.
        cos: (L, E / 2) float32, the angles of the positions of a row, L at least the longest length.
        sin: (L, E / 2) float32.
        with_rows: whether somebody asks for `Packing.rows`.
    """
    rows = torch.repeat_interleave(torch.tensor(lengths)).to(cos.device) if with_rows else None
    rotation = Rotation(torch.cat([cos[:n] for n in lengths]), torch.cat([sin[:n] for n in lengths]))
    return Packing(lengths, _groups(lengths, cos.device), rotation, rows)


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Return the attention of every token over its row.

    Args:
        q: (T, H, E), rotated.
        k: (T, H, E), rotated.
        v: (T, H, E).
        packing: of the rows.

    Returns:
        (T, H E).
    """
    out = torch.empty_like(v) if len(packing.groups) > 1 else None
    for index, length in packing.groups:
        parts = [a if index is None else a[index] for a in (q, k, v)]
        rows = [a.unflatten(0, (-1, length)).transpose(1, 2) for a in parts]  # each (B', H, L, E)
        attended = _attention(*rows).transpose(1, 2).flatten(0, 1)
        if out is None or index is None:
            return attended.flatten(1)
        out[index] = attended
    assert out is not None
    return out.flatten(1)


def attend_at(positions: Tensor, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Return the attention of some tokens over their rows: `attend` at these positions.

    Args:
        positions: (R,) int64 indices into T, in any order; on the CPU they cost a GPU no synchronisation.
        q: (R, H, E), the queries of these positions, rotated.
        k: (T, H, E), rotated.
        v: (T, H, E).
        packing: of the rows.

    Returns:
        (R, H E).
    """
    lengths = packing.lengths
    ends = torch.tensor(lengths, device=positions.device).cumsum(0)
    row = torch.searchsorted(ends, positions, right=True)
    counts = torch.bincount(row, minlength=len(lengths))
    order = row.argsort(stable=True)
    slot = torch.empty_like(row)
    slot[order] = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    # So many queries a row, filled up: few shapes, and no product of so few rows that a CPU computes it otherwise.
    width = -(-int(counts.max()) // MIN_GEMM_ROWS) * MIN_GEMM_ROWS
    row, slot = row.to(q.device), slot.to(q.device)
    queries = q.new_zeros(len(lengths), width, *q.shape[1:]).index_put((row, slot), q).transpose(1, 2)
    out = torch.empty_like(queries) if len(packing.groups) > 1 else None
    numbers = torch.tensor(lengths)
    for index, length in packing.groups:
        keys, values = (
            (a if index is None else a[index]).unflatten(0, (-1, length)).transpose(1, 2) for a in (k, v)
        )
        if out is None:
            return _attention(queries, keys, values).transpose(1, 2)[row, slot].flatten(1)
        group = (numbers == length).nonzero()[:, 0].to(q.device)
        out[group] = _attention(queries[group], keys, values)
    assert out is not None
    return out.transpose(1, 2)[row, slot].flatten(1)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention, q (B, H, Q, E), k and v (B, H, L, E) -> (B, H, Q, E)."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # The fused kernel's backward pass on a CPU is many times slower than these two products.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores, -1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _groups(lengths: Sequence[int], device: torch.device) -> list[tuple[Tensor | None, int]]:
    """Split packed rows into groups of equal length: (indices of their tokens or None for all, the length)."""
    if len(set(lengths)) == 1:
        return [(None, lengths[0])]
    per_row = torch.arange(sum(lengths)).split(list(lengths))
    return [
        (
            torch.cat([tokens for tokens, n in zip(per_row, lengths, strict=True) if n == length]).to(device),
            length,
        )
        for length in sorted(set(lengths))
    ]
