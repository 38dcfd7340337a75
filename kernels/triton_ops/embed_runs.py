"""Sums of the rows of a gradient over a stable sort by their digits: the same bits in every run.

Shapes: as in `embed_gradient`, for tables of many values.

Two levels, so that one long run (the mask: about half of all digits) is shared by many programs: pieces of CHUNK sorted
rows finish the runs that lie inside of them and hand on their first and last sums, which are then added value by value
in the order of the pieces.

Bytes: the gradient is read once, in rows of E numbers; the sort reads and writes 12 N bytes a pass of its radix; the
sums that are handed on are 2 / CHUNK of the gradient's numbers. FLOPs: N E additions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_ops.compile_case import CompileCase

CHUNK = 64
COLUMNS = 128
SUMS_AT_ONCE = 16


class GradientRows(NamedTuple):
    """What every launcher needs: the gradient, flat and contiguous, y (N,), and the kernels' constants."""

    gradient: Tensor
    y: Tensor
    num_values: int
    constants: dict[str, Any]

    @property
    def num_columns(self) -> int:
        """E."""
        return int(self.constants["E"])


@triton.jit
def column_if(condition, column, E: tl.constexpr):
    """Return which columns are below E, and none of them if a condition on the whole program is false.

    Written as one comparison: Triton's interpreter (3.9) makes no mask of a scalar and a block of truth values.
    """
    return column < tl.where(condition, E, 0)


@triton.jit
def row_offset(row, LAYOUT: tl.constexpr, E: tl.constexpr, C: tl.constexpr, P: tl.constexpr, S: tl.constexpr):
    """Return where row (image, channel, pixel, digit) begins; its columns are P apart for "channels_first", else 1."""
    if LAYOUT == "tokens":
        return row * E
    else:
        plane = row // (P * S) * S + row % S  # (image C + channel) S + digit
        pixel = row // S % P
        if LAYOUT == "channels_first":
            return plane * (E * P) + pixel
        else:
            return ((plane // (C * S) * P + pixel) * (C * S) + plane % (C * S)) * E


@triton.jit
def runs_kernel(
    table_ptr,
    first_ptr,
    last_ptr,
    gradient_ptr,
    digits_ptr,
    order_ptr,
    num_rows,
    num_values,
    LAYOUT: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the runs of equal digits in one piece of CHUNK sorted rows.

    The first and the last run may go on in other pieces: their sums go to (pieces, E) each, a run that is both to
    the first. What lies between is complete and goes to the table's gradient.
    """
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step: tl.constexpr = P if LAYOUT == "channels_first" else 1
    current = tl.load(digits_ptr + piece * CHUNK).to(tl.int64)
    num_ended = tl.zeros([], tl.int32)
    sums = tl.zeros([COLUMNS], first_ptr.dtype.element_ty)
    for index in range(CHUNK):
        position = piece * CHUNK + index
        exists = position < num_rows
        digit = tl.where(exists, tl.load(digits_ptr + position, exists, other=0).to(tl.int64), current)
        row = tl.load(order_ptr + position, exists, other=0)
        address = gradient_ptr + row_offset(row, LAYOUT, E, C, P, S) + column * step
        numbers = tl.load(address, column_if(exists, column, E), other=0.0).to(sums.dtype)
        ended = digit != current
        known = (current >= 0) & (current < num_values)
        tl.store(first_ptr + piece * E + column, sums, column_if(ended & (num_ended == 0), column, E))
        tl.store(
            table_ptr + current * E + column, sums, column_if(ended & (num_ended > 0) & known, column, E)
        )
        sums = tl.where(ended, numbers, sums + numbers)
        num_ended += ended.to(tl.int32)
        current = digit
    tl.store(first_ptr + piece * E + column, sums, column_if(num_ended == 0, column, E))
    tl.store(last_ptr + piece * E + column, sums, column_if(num_ended > 0, column, E))


@triton.jit
def segments_kernel(
    table_ptr,
    first_ptr,
    last_ptr,
    starts_ptr,
    num_rows,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Write the row of one value, unless `runs_kernel` has; its sorted rows are start..stop-1."""
    value = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = column < E
    start, stop = tl.load(starts_ptr + value), tl.load(starts_ptr + value + 1)
    first, last = start // CHUNK, (stop - 1) // CHUNK
    used = start < stop
    at_front = start % CHUNK == 0
    complete = used & (first == last) & (start % CHUNK != 0) & (stop % CHUNK != 0) & (stop < num_rows)
    sums = tl.load(first_ptr + first * E + column, column_if(used & at_front, column, E), other=0.0)
    sums += tl.load(
        last_ptr + first * E + column, column_if(used & (start % CHUNK != 0), column, E), other=0.0
    )
    piece = first + 1
    while piece <= last:
        more = (piece + tl.arange(0, SUMS))[:, None]
        tile = tl.load(first_ptr + more * E + column, inside & (more <= last), other=0.0)
        sums += tl.sum(tile, 0, keep_dims=True)
        piece += SUMS
    tl.store(table_ptr + value * E + column, sums, column_if(complete == 0, column, E))


def sum_sorted_runs(work: GradientRows, sums_dtype: torch.dtype, table_dtype: torch.dtype) -> Tensor:
    """Return the gradient (b + 1, E) of the table, summed in one number type and written in another."""
    num_rows, num_columns = len(work.y), work.num_columns
    digits, order = work.y.to(torch.int32).sort(stable=True)
    values = torch.arange(work.num_values + 1, dtype=torch.int32, device=work.y.device)
    starts = torch.searchsorted(digits, values)
    num_pieces, num_blocks = triton.cdiv(num_rows, CHUNK), triton.cdiv(num_columns, COLUMNS)
    first, last = work.gradient.new_empty(2, num_pieces, num_columns, dtype=sums_dtype)
    table = work.gradient.new_empty(work.num_values, num_columns, dtype=table_dtype)
    runs_kernel[(num_pieces, num_blocks)](
        table,
        first,
        last,
        work.gradient,
        digits,
        order,
        num_rows,
        work.num_values,
        **work.constants,
        CHUNK=CHUNK,
        COLUMNS=COLUMNS,
        num_warps=1,
    )
    segments_kernel[(work.num_values, num_blocks)](
        table,
        first,
        last,
        starts,
        num_rows,
        E=num_columns,
        CHUNK=CHUNK,
        COLUMNS=COLUMNS,
        SUMS=SUMS_AT_ONCE,
        num_warps=2,
    )
    return table


_TYPES = {
    **dict.fromkeys(("table_ptr", "first_ptr", "last_ptr", "gradient_ptr"), "*fp32:16"),
    **dict.fromkeys(("order_ptr", "starts_ptr"), "*i64:16"),
    "digits_ptr": "*i32:16",
    "num_rows": "i32:16",
    "num_values": "i32",
}
_RUNS = {"E": 768, "CHUNK": CHUNK, "COLUMNS": COLUMNS}

COMPILE_CASES = [
    CompileCase(
        "embed gradient, sorted runs",
        runs_kernel,
        _TYPES,
        _RUNS | {"LAYOUT": "tokens", "C": 1, "P": 1, "S": 1},
        num_warps=1,
    ),
    CompileCase(
        "embed gradient, sums of runs",
        segments_kernel,
        _TYPES,
        _RUNS | {"SUMS": SUMS_AT_ONCE},
        num_warps=2,
    ),
]
