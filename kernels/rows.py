"""Compaction of rows: the rows that need work come first, and their number stays on the device.

Shapes: B rows, N places of a smaller batch.

Nothing here waits for the device. A caller that has to know how many rows there are (to choose the size of a batch)
starts a copy of the number (`kernels.transfers.HostCopy`), goes on queueing work that does not depend on it, and then
waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend


class CompactedRows(NamedTuple):
    """Result of `compact_rows`.

    Attributes:
        indices: (B,) int64, the changed rows in order, then the others in order.
        num_changed: (1,) int64.
    """

    indices: Tensor
    num_changed: Tensor


def compact_rows(changed: Tensor, *, backend: Backend = "auto") -> CompactedRows:
    """Put the rows that changed first, in order.

    Args:
        changed: (B,) bool.
        backend: see `choose_backend`.

    Raises:
        ValueError: if ``changed`` is not (B,) bool, or the backend is not available.
    """
    if changed.ndim != 1 or changed.dtype != torch.bool:
        raise ValueError(f"changed must be (rows,) bool, got {tuple(changed.shape)} {changed.dtype}")
    if choose_backend(backend, changed) == "triton":
        from kernels.triton_ops.rows import launch_compact_rows

        return CompactedRows(*launch_compact_rows(changed))
    indices = changed.logical_not().to(torch.uint8).argsort(stable=True)
    return CompactedRows(indices, changed.sum(0, keepdim=True))


def gather_rows(
    source: Tensor, indices: Tensor, count: Tensor, out: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Copy the rows ``indices[:count]`` of a batch to the front of a smaller one.

    Args:
        source: (B, ...), any dtype, contiguous.
        indices: at least (N,) int64 in 0..B-1.
        count: (1,) int64; min(count, N) rows are copied.
        out: (N, ...) in the dtype of ``source``, contiguous; its rows from ``count`` on are left as they are.
        backend: see `choose_backend`.

    Returns:
        ``out``.

    Raises:
        ValueError: if a shape or dtype does not fit, or the backend is not available.
    """
    _check_rows(source, indices, count, out)
    if choose_backend(backend, source) == "triton":
        from kernels.triton_ops.rows import launch_copy_rows

        launch_copy_rows(source, out, indices, count, scatter=False)
        return out
    if source.device.type == "cpu":  # counting is free
        number = min(int(count), len(out))
        torch.index_select(source, 0, indices[:number], out=out[:number])
        return out
    inside = torch.arange(len(out), device=out.device) < count
    out.copy_(torch.where(_as_rows(inside, out), source[indices[: len(out)]], out))
    return out


def scatter_rows(
    rows: Tensor, indices: Tensor, count: Tensor, target: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Copy the first rows of a smaller batch back to the places ``indices[:count]``: the inverse of `gather_rows`.

    Args:
        rows: (N, ...), any dtype, contiguous.
        indices: at least (N,) int64 in 0..B-1, all different.
        count: (1,) int64; min(count, N) rows are copied.
        target: (B, ...) in the dtype of ``rows``, contiguous; its other rows are left as they are.
        backend: see `choose_backend`.

    Returns:
        ``target``.

    Raises:
        ValueError: if a shape or dtype does not fit, or the backend is not available.
    """
    _check_rows(target, indices, count, rows)
    if choose_backend(backend, rows) == "triton":
        from kernels.triton_ops.rows import launch_copy_rows

        launch_copy_rows(rows, target, indices, count, scatter=True)
        return target
    if rows.device.type == "cpu":
        number = min(int(count), len(rows))
        return target.index_copy_(0, indices[:number], rows[:number])
    places = indices[: len(rows)]
    inside = torch.arange(len(rows), device=rows.device) < count
    return target.index_copy_(0, places, torch.where(_as_rows(inside, rows), rows, target[places]))


def _as_rows(inside: Tensor, rows: Tensor) -> Tensor:
    return inside.view(-1, *[1] * (rows.ndim - 1))


def _check_rows(batch: Tensor, indices: Tensor, count: Tensor, some: Tensor) -> None:
    if batch.shape[1:] != some.shape[1:] or batch.dtype != some.dtype:
        raise ValueError(
            f"rows must have one shape and dtype, got {tuple(batch.shape)} {batch.dtype} and {tuple(some.shape)} "
            f"{some.dtype}"
        )
    if not (batch.is_contiguous() and some.is_contiguous()):
        raise ValueError("rows must be contiguous: they are copied whole")
    if indices.ndim != 1 or len(indices) < len(some) or indices.dtype != torch.int64:
        raise ValueError(
            f"indices must be at least ({len(some)},) int64, got {tuple(indices.shape)} {indices.dtype}"
        )
    if count.shape != (1,) or count.dtype != torch.int64:
        raise ValueError(f"count must be (1,) int64, got {tuple(count.shape)} {count.dtype}")
