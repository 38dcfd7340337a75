"""Digit embedding: the digits of a token side by side."""

from __future__ import annotations

import torch

from kernels.embed import embed_subtokens


def test_digit_embeddings_are_concatenated_in_order() -> None:
    table = torch.arange(12.0).reshape(4, 3)  # b = 3, the last row is the mask's
    y_t = torch.tensor([[[0, 3], [2, 1]]])
    expected = torch.tensor([[[0.0, 1, 2, 9, 10, 11], [6, 7, 8, 3, 4, 5]]])
    assert torch.equal(embed_subtokens(y_t, table), expected)


def test_result_has_the_dtype_of_the_table_and_gradients_flow() -> None:
    table = torch.zeros(4, 3, dtype=torch.bfloat16, requires_grad=True)
    out = embed_subtokens(torch.tensor([[3, 3]]), table)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert table.grad is not None
    assert table.grad[3].tolist() == [2, 2, 2]
    assert not table.grad[:3].any()
