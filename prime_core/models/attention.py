"""Full attention inside packed rows (`prime_core.models.packing`).

Shapes: B rows of lengths L, T tokens of all rows laid end to end, R query positions, Q queries of a row, H heads, E
features of a head.

Rows of one length are attended together, so a longer neighbour never changes what a row computes and nothing is padded
but the queries of `attend_at`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from prime_core.models.packing import Queries, RowGroup


def attend(q: Tensor, k: Tensor, v: Tensor, groups: list[RowGroup] | int) -> Tensor:
    """Return the attention of every token over its row.

    Args:
        q: (T, H, E), rotated.
        k: (T, H, E), rotated.
        v: (T, H, E).
        groups: of the rows, `group_rows`.

    Returns:
        (T, H E).
    """
    if isinstance(groups, int):
        return _attention(*(_by_row(a, groups) for a in (q, k, v))).transpose(1, 2).flatten(0, 1).flatten(1)
    out = torch.empty_like(v)
    with _without_plans(q.device):
        for length, _, tokens in groups:
            rows = [_by_row(a[tokens], length) for a in (q, k, v)]
            out[tokens] = _attention(*rows).transpose(1, 2).flatten(0, 1)
    return out.flatten(1)


def attend_at(queries: Queries, q: Tensor, k: Tensor, v: Tensor, groups: list[RowGroup] | int) -> Tensor:
    """Return the attention of some tokens over their rows: `attend` at these tokens.

    Args:
        queries: which tokens, `place_queries`.
        q: (R, H, E), their queries, rotated.
        k: (T, H, E), rotated.
        v: (T, H, E).
        groups: of the rows, `group_rows`.

    Returns:
        (R, H E).
    """
    place = queries.row, queries.slot
    batch = q.new_zeros(*queries.shape, *q.shape[1:]).index_put(place, q).transpose(1, 2)
    with _without_plans(q.device):
        if isinstance(groups, int):
            out = _attention(batch, _by_row(k, groups), _by_row(v, groups))
        else:
            out = torch.empty_like(batch)
            for length, rows, tokens in groups:
                keys, values = (_by_row(a[tokens], length) for a in (k, v))
                out[rows] = _attention(batch[rows], keys, values)
    return out.transpose(1, 2)[place].flatten(1)


def _by_row(packed: Tensor, length: int) -> Tensor:
    """Map (B L, H, E) to (B, H, L, E), without a copy."""
    rows: Tensor = packed.unflatten(0, (-1, length))
    return rows.transpose(1, 2)


@contextmanager
def _without_plans(device: torch.device) -> Iterator[None]:
    """Attend by kernels that take any shape as it comes: for calls of which hardly two have the same shape.

    Where torch prefers cuDNN, as on Hopper, a plan is built for every number of rows, queries and keys, and kept. That
    is reported to take tens of milliseconds each; it is not measured here yet.
    """
    backends = torch.backends.cuda
    if device.type != "cuda" or not backends.cudnn_sdp_enabled():
        yield
        return
    backends.enable_cudnn_sdp(False)  # of the whole process: another thread may take another kernel meanwhile
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(True)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention, q (B, H, Q, E), k and v (B, H, L, E) -> (B, H, Q, E)."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # The fused kernel's backward pass on a CPU is many times slower than these two products.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores, -1) @ v
    return F.scaled_dot_product_attention(q, k, v)
