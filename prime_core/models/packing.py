"""Rows of different lengths, laid end to end without padding, and what a transformer must know of where each one lies.

Shapes: B rows of lengths L, B' rows of one length, T tokens of all rows laid end to end, R query positions, Q queries
of a row, E features of an attention head.

All of it depends on lengths and positions alone, so it is made once for all blocks of a network. It goes to the device
before the first block is queued there: later a GPU would be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.transfers import queued
from prime_core.models.denoiser import MIN_GEMM_ROWS


class Rotation(NamedTuple):
    """Rotary angles of every packed token: cos and sin, each (T, E / 2) float32."""

    cos: Tensor
    sin: Tensor


class RowGroup(NamedTuple):
    """Rows of one length.

    Attributes:
        length: tokens of each.
        rows: their numbers: (B',) int64, or a slice where they lie side by side, so that nothing need be gathered.
        tokens: their tokens among the packed ones: (B' L,) int64, or a slice.
    """

    length: int
    rows: Tensor | slice
    tokens: Tensor | slice


def group_rows(lengths: Sequence[int], device: torch.device) -> list[RowGroup] | int:
    """Group rows by length: once for all blocks of a network, before any of them is queued on a GPU.

    Args:
        lengths: tokens of each row.
        device: where the attention is.

    Returns:
        The groups; where all rows have one length, that length.
    """
    if len(set(lengths)) == 1:
        return lengths[0]
    numbers = torch.tensor(lengths)
    of_token = numbers.repeat_interleave(numbers)
    return [
        RowGroup(length, *(_places(part == length, device) for part in (numbers, of_token)))
        for length in sorted(set(lengths))
    ]


def _places(chosen: Tensor, device: torch.device) -> Tensor | slice:
    """Return where ``chosen`` is true, which is somewhere: a slice if that is one stretch."""
    places = chosen.nonzero()[:, 0]
    start, stop = int(places[0]), int(places[-1]) + 1
    return slice(start, stop) if stop - start == len(places) else queued(places, device)


class Packing(NamedTuple):
    """How the rows of a call lie end to end. All of it is where the network is before its first block runs.

    Attributes:
        groups: of the rows, `group_rows`.
        rotation: the angles of every token.
        rows: (T,) int64, the row of every token; None where nobody asks for it.
    """

    groups: list[RowGroup] | int
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
    rows = queued(torch.repeat_interleave(torch.tensor(lengths)), cos.device) if with_rows else None
    rotation = Rotation(torch.cat([cos[:n] for n in lengths]), torch.cat([sin[:n] for n in lengths]))
    return Packing(group_rows(lengths, cos.device), rotation, rows)


class Queries(NamedTuple):
    """Tokens whose attention is asked for, and where each of them stands in a batch of queries (B, Q).

    Attributes:
        tokens: (R,) int64, indices into T.
        row: (R,) int64 in 0..B-1.
        slot: (R,) int64 in 0..Q-1, the rank among the queries of its row.
        shape: B and Q.
    """

    tokens: Tensor
    row: Tensor
    slot: Tensor
    shape: tuple[int, int]


def place_queries(positions: Tensor, lengths: Sequence[int], device: torch.device) -> Queries:
    """Find the places of some tokens; before anything is queued on a GPU that would have to be waited for.

    Args:
        positions: (R,) int64 indices into T, in any order; on the CPU they cost a GPU no synchronisation.
        lengths: tokens of each row; they sum to T.
        device: where the attention is.
    """
    ends = torch.tensor(lengths, device=positions.device).cumsum(0)
    row = torch.searchsorted(ends, positions, right=True)
    counts = torch.bincount(row, minlength=len(lengths))
    order = row.argsort(stable=True)
    slot = torch.empty_like(row)
    slot[order] = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    # So many queries a row, filled up: few shapes, and no product of so few rows that a CPU computes it otherwise.
    width = -(-int(counts.max()) // MIN_GEMM_ROWS) * MIN_GEMM_ROWS
    tokens, row, slot = (queued(part, device) for part in (positions, row, slot))
    return Queries(tokens, row, slot, (len(lengths), width))
