"""Rows laid end to end: each is attended as it is alone, and rows of one length side by side are not gathered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prime_core.models.attention import attend, attend_at
from prime_core.models.packing import RowGroup, group_rows, place_queries

CPU = torch.device("cpu")
LENGTHS = {
    "one length": [3, 3],
    "side by side": [2, 3, 3, 5],
    "apart": [3, 5, 3, 2, 5],
    "a stretch and a gap": [4, 1, 1, 4, 6],
}


def heads(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v = torch.randn(3, num_tokens, 2, 8, generator=generator)
    return q, k, v


def alone(lengths: list[int]) -> Tensor:
    q, k, v = (part.split(lengths) for part in heads(sum(lengths)))
    rows = [
        F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in row)).transpose(0, 1).flatten(1)
        for row in zip(q, k, v, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_are_attended_as_they_are_alone(lengths: list[int]) -> None:
    q, k, v = heads(sum(lengths))
    groups, want = group_rows(lengths, CPU), alone(lengths)
    torch.testing.assert_close(attend(q, k, v, groups), want)
    positions = torch.tensor([sum(lengths) - 1, 0, 2, 4, 1])
    queries = place_queries(positions, lengths, CPU)
    torch.testing.assert_close(attend_at(queries, q[positions], k, v, groups), want[positions])


def test_rows_side_by_side_are_slices_and_others_are_found() -> None:
    assert group_rows([3, 3], CPU) == 3
    assert group_rows([2, 3, 3], CPU) == [
        RowGroup(2, slice(0, 1), slice(0, 2)),
        RowGroup(3, slice(1, 3), slice(2, 8)),
    ]
    groups = group_rows([1, 2, 1], CPU)
    assert isinstance(groups, list)
    (ones, twos) = groups
    assert isinstance(ones.rows, Tensor) and ones.rows.tolist() == [0, 2]
    assert isinstance(ones.tokens, Tensor) and ones.tokens.tolist() == [0, 3]
    assert twos == RowGroup(2, slice(1, 2), slice(1, 3))
