"""The gradient of an embedding table: sums of the rows of a gradient by their digits.

Shapes: N digits in all, E columns of the table, b + 1 values (the last one is the mask), C, P and S as in `embed`.
Row n of the gradient belongs to digit y[n]; `embed_runs.row_offset` says where its E numbers are.

Bytes: the gradient is read once (N E times its width), y once (8 N), the table's gradient is written once. Text,
T = 64 x 1024, S = 4, D = 768, float32: 203 MB, 61 us at the 3.35 TB/s of an H100. FLOPs: N E additions; the way for few
values does a comparison and an addition for each of them, (b + 1) N E in all, 0.8 G for this example at 16 values,
which fits in the time of the bytes (132 x 128 lanes at 1.7 GHz do 1.8 G such additions in it).

Three ways:
- few values (at most FEW_VALUES): a program sums its own piece of the rows in registers, one row of sums a value; the
  pieces' sums are added in their order. Every run gives the same bits, so it serves both modes. Writing and reading
  the sums adds 2 (b + 1) / (rows of a piece) of the gradient's numbers: an eighth for the example above.
- many values, any order: float32 atomics. About half of all digits are masked, so each program first sums the rows of
  the mask itself and adds them at once.
- many values, deterministic: a stable sort by digit, then sums over its runs, in `embed_runs`.

The size of pieces depends on the shape only, never on the device's load. Nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_ops.compile_case import CompileCase
from kernels.triton_ops.embed_runs import COLUMNS, GradientRows, column_if, row_offset, sum_sorted_runs
from kernels.triton_ops.launch import on_its_device

FEW_VALUES = 32
MAX_PIECES = 1024
MIN_PIECE = 64
ROWS_AT_ONCE = 8
FEW_COLUMNS = 64
ATOMIC_ROWS = 8


@triton.jit
def few_values_kernel(
    sums_ptr,
    gradient_ptr,
    y_ptr,
    num_rows,
    num_values,
    LAYOUT: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    PIECE: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the sums (pieces, b + 1, E) of one piece of rows."""
    value = tl.arange(0, VALUES)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    step: tl.constexpr = P if LAYOUT == "channels_first" else 1
    sums = tl.zeros([VALUES, COLUMNS], sums_ptr.dtype.element_ty)
    first = tl.program_id(0).to(tl.int64) * PIECE
    for start in range(0, PIECE, ROWS):
        for index in tl.static_range(ROWS):
            row = first + start + index
            digit = tl.load(y_ptr + row, row < num_rows, other=-1)
            address = gradient_ptr + row_offset(row, LAYOUT, E, C, P, S) + column * step
            numbers = tl.load(address, column_if(row < num_rows, column, E), other=0.0).to(sums.dtype)
            sums += tl.where(value == digit, numbers, 0.0)
    target = sums_ptr + (tl.program_id(0).to(tl.int64) * num_values + value) * E + column
    tl.store(target, sums, (value < num_values) & (column < E))


@triton.jit
def atomic_kernel(
    table_ptr,
    gradient_ptr,
    y_ptr,
    num_rows,
    num_values,
    LAYOUT: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add ROWS rows to the table's gradient (b + 1, E), zero at first."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    step: tl.constexpr = P if LAYOUT == "channels_first" else 1
    digit = tl.load(y_ptr + row, row < num_rows, other=-1).to(tl.int64)
    address = gradient_ptr + row_offset(row, LAYOUT, E, C, P, S) + column * step
    numbers = tl.load(address, (row < num_rows) & (column < E), other=0.0).to(table_ptr.dtype.element_ty)
    masked = digit == num_values - 1
    visible = (digit >= 0) & (digit < num_values - 1)
    tl.atomic_add(table_ptr + digit * E + column, numbers, visible & (column < E), sem="relaxed")
    mask_sum = tl.sum(tl.where(masked, numbers, 0.0), 0, keep_dims=True)
    any_masked = tl.max(masked.to(tl.int32), 0, keep_dims=True) > 0
    mask_row = table_ptr + (tl.zeros([1, 1], tl.int64) + num_values - 1) * E
    tl.atomic_add(mask_row + column, mask_sum, any_masked & (column < E), sem="relaxed")


@on_its_device
def table_gradient(
    gradient: Tensor,
    y: Tensor,
    table_shape: tuple[int, int],
    table_dtype: torch.dtype,
    layout: str,
    sizes: tuple[int, int, int],
    deterministic: bool,
) -> Tensor:
    """Return the gradient (b + 1, E) of the table.

    Args:
        gradient: flat and contiguous, in a layout of `kernels.triton_ops.embed`.
        y: (N,) int64, contiguous.
        table_shape: (b + 1, E).
        table_dtype: of the result. Sums are float32, or float64 for float64.
        layout: of the gradient.
        sizes: C, P and S.
        deterministic: the same bits in every run.
    """
    num_values, num_columns = table_shape
    sums_dtype = torch.float64 if table_dtype == torch.float64 else torch.float32
    if not gradient.numel():
        return gradient.new_zeros(table_shape, dtype=table_dtype)
    channels, pixels, num_digits = sizes
    constants = {"LAYOUT": layout, "E": num_columns, "C": channels, "P": pixels, "S": num_digits}
    work = GradientRows(gradient, y, num_values, constants)
    if num_values <= FEW_VALUES:
        return _few_values(work, sums_dtype).to(table_dtype)
    if deterministic:
        return sum_sorted_runs(work, sums_dtype, table_dtype)
    return _atomics(work, sums_dtype).to(table_dtype)


def _few_values(work: GradientRows, sums_dtype: torch.dtype) -> Tensor:
    num_rows, num_columns = len(work.y), work.num_columns
    piece_size = max(MIN_PIECE, triton.next_power_of_2(triton.cdiv(num_rows, MAX_PIECES)))
    num_pieces = triton.cdiv(num_rows, piece_size)
    sums = work.gradient.new_empty(num_pieces, work.num_values, num_columns, dtype=sums_dtype)
    few_values_kernel[(num_pieces, triton.cdiv(num_columns, FEW_COLUMNS))](
        sums,
        work.gradient,
        work.y,
        num_rows,
        work.num_values,
        **work.constants,
        PIECE=piece_size,
        VALUES=max(2, triton.next_power_of_2(work.num_values)),
        COLUMNS=FEW_COLUMNS,
        ROWS=ROWS_AT_ONCE,
        num_warps=1,
    )
    return sums.sum(0)


def _atomics(work: GradientRows, sums_dtype: torch.dtype) -> Tensor:
    table = work.gradient.new_zeros(work.num_values, work.num_columns, dtype=sums_dtype)
    grid = triton.cdiv(len(work.y), ATOMIC_ROWS), triton.cdiv(work.num_columns, COLUMNS)
    atomic_kernel[grid](
        table,
        work.gradient,
        work.y,
        len(work.y),
        work.num_values,
        **work.constants,
        ROWS=ATOMIC_ROWS,
        COLUMNS=COLUMNS,
    )
    return table


_TYPES = {
    **dict.fromkeys(("table_ptr", "sums_ptr", "gradient_ptr"), "*fp32:16"),
    "y_ptr": "*i64:16",
    "num_rows": "i32:16",
    "num_values": "i32",
}
_TEXT = {"LAYOUT": "tokens", "C": 1, "P": 1, "S": 1}
_PLANES = {"LAYOUT": "channels_first", "E": 48, "C": 3, "P": 1024, "S": 2}
_FEW = {"PIECE": 256, "COLUMNS": FEW_COLUMNS, "ROWS": ROWS_AT_ONCE}

COMPILE_CASES = [
    CompileCase(
        "embed gradient, 16 values, tokens",
        few_values_kernel,
        _TYPES,
        _TEXT | _FEW | {"E": 192, "VALUES": 16},
        num_warps=1,
    ),
    CompileCase(
        "embed gradient, 17 values, channels first, bf16",
        few_values_kernel,
        _TYPES | {"gradient_ptr": "*bf16:16"},
        _PLANES | _FEW | {"VALUES": 32},
        num_warps=1,
    ),
    *(
        CompileCase(
            f"embed gradient, atomics, {num_columns} columns",
            atomic_kernel,
            _TYPES,
            _TEXT | {"E": num_columns, "ROWS": ATOMIC_ROWS, "COLUMNS": COLUMNS},
        )
        for num_columns in (384, 768)
    ),
]
