"""Gather digit embeddings, lay the digits of a token side by side and cast, in one pass.

Shapes: T tokens, S digits a token, E columns of the table, D = S E, N = T S digits in all; for images B images, C
planes of tokens, P = H W pixels, Q = C S digit planes, N = B C P S.

Bytes: y is read once (8 N), the result is written once (N E times its width); the table's rows come from the cache,
where even V = 50257 tables stay for the rows in use. Text, T = 64 x 1024, S = 4, D = 768, float32: 2.1 MB read and
201 MB written, 61 us at the 3.35 TB/s of an H100. Images, B = 128, Q = 6, P = 1024, E = 48, bfloat16: 6.3 MB and
75 MB, 24 us. No arithmetic but addresses. A gather, a concatenation, a cast and (for images) a transposition of their
own would write and read the result two to three times more.

Layouts of the result: "tokens" (T, D), "channels_last" (B, P, Q E), "channels_first" (B, Q E, P). The first two have
a digit's E columns side by side in memory, the last one has its pixels side by side.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_ops.compile_case import CompileCase
from kernels.triton_ops.embed_gradient import table_gradient
from kernels.triton_ops.launch import on_its_device

Layout = Literal["tokens", "channels_last", "channels_first"]

TILE = 2048
PIXEL_BLOCK = 256
COLUMN_BLOCK = 8


@triton.jit
def nan_unless(known, value, OUT: tl.constexpr):
    """Return value in the type OUT, NaN where it is not known; by way of float32, as PyTorch casts too."""
    if value.dtype == tl.float64 and OUT == tl.float64:
        return tl.where(known, value, float("nan"))
    else:
        return tl.where(known, value.to(tl.float32), float("nan")).to(OUT)


@triton.jit
def side_by_side_kernel(
    out_ptr,
    y_ptr,
    table_ptr,
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
    """Write ROWS digits' columns of "tokens" or "channels_last", (N, E); table (b + 1, E)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    digit_row = row
    if LAYOUT == "channels_last":
        pixel, plane = row // (C * S), row % (C * S)
        image, position = pixel // P, pixel % P
        digit_row = ((image * C + plane // S) * P + position) * S + plane % S
    digit = tl.load(y_ptr + digit_row, row < num_rows, other=-1).to(tl.int64)
    known = (digit >= 0) & (digit < num_values)
    for start in tl.static_range(0, E, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = row < num_rows
        if (
            start + COLUMNS > E
        ):  # where blocks of columns fit, their mask would only be in the way of wide loads
            inside = inside & (column < E)
        value = tl.load(table_ptr + digit * E + column, inside & known, other=0.0)
        value = nan_unless(known, value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * E + column, value, inside)


@triton.jit
def channels_first_kernel(
    out_ptr,
    y_ptr,
    transposed_ptr,
    num_values,
    E: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    PIXEL_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """Write all columns of one digit plane for PIXEL_BLOCK pixels of an image; table (E, b + 1).

    With the table transposed the pixels of a warp read near addresses: b + 1 of them, where it is small.
    """
    num_blocks: tl.constexpr = (P + PIXEL_BLOCK - 1) // PIXEL_BLOCK
    # Counts over images too: (image C + channel) S + digit.
    plane = (tl.program_id(0) // num_blocks).to(tl.int64)
    pixel = tl.program_id(0) % num_blocks * PIXEL_BLOCK + tl.arange(0, PIXEL_BLOCK)
    digit = tl.load(y_ptr + (plane // S * P + pixel) * S + plane % S, pixel < P, other=-1).to(tl.int64)
    known = (digit >= 0) & (digit < num_values)
    for start in range(0, E, COLUMN_BLOCK):
        column = start + tl.arange(0, COLUMN_BLOCK)[:, None]
        inside = (column < E) & (pixel < P)[None, :]
        address = transposed_ptr + column * num_values + digit[None, :]
        value = tl.load(address, inside & known[None, :], other=0.0)
        value = nan_unless(known[None, :], value, out_ptr.dtype.element_ty)
        out = out_ptr + (plane * E + column) * P + pixel[None, :]
        tl.store(out, value, inside)


@on_its_device
def launch_embed(y_t: Tensor, table: Tensor, out_dtype: torch.dtype, layout: Layout) -> Tensor:
    """Return the embeddings of y_t, (..., S) or (B, C, H, W, S) contiguous, as a flat contiguous tensor."""
    num_columns = table.shape[1]
    out = torch.empty(y_t.numel() * num_columns, dtype=out_dtype, device=table.device)
    if not out.numel():
        return out
    channels, pixels, num_digits = plane_sizes(y_t, layout)
    if layout == "channels_first":
        num_programs = y_t.numel() // pixels * triton.cdiv(pixels, PIXEL_BLOCK)
        channels_first_kernel[(num_programs,)](
            out,
            y_t,
            table.t().contiguous(),
            len(table),
            E=num_columns,
            P=pixels,
            S=num_digits,
            PIXEL_BLOCK=PIXEL_BLOCK,
            COLUMN_BLOCK=COLUMN_BLOCK,
        )
        return out
    columns = column_block(num_columns)
    rows = TILE // columns
    side_by_side_kernel[(triton.cdiv(y_t.numel(), rows),)](
        out,
        y_t,
        table.contiguous(),
        y_t.numel(),
        len(table),
        LAYOUT=layout,
        E=num_columns,
        C=channels,
        P=pixels,
        S=num_digits,
        ROWS=rows,
        COLUMNS=columns,
    )
    return out


def column_block(num_columns: int) -> int:
    """Return how many columns are worked on at once: a power of two, which divides E where that leaves wide rows."""
    divisor = num_columns & -num_columns
    return min(divisor, 256) if divisor >= 16 else min(int(triton.next_power_of_2(num_columns)), 256)


def plane_sizes(y_t: Tensor, layout: Layout) -> tuple[int, int, int]:
    """Return C, P and S of images (B, C, H, W, S); tokens need none, and their kernels shall not depend on them."""
    if layout == "tokens":
        return 1, 1, 1
    _, channels, height, width, num_digits = y_t.shape
    return channels, height * width, num_digits


class Embed(torch.autograd.Function):
    """`launch_embed` with the gradient of the table."""

    @staticmethod
    def forward(
        ctx: Any, y_t: Tensor, table: Tensor, out_dtype: torch.dtype, layout: Layout, deterministic: bool
    ) -> Tensor:
        """Return the flat embeddings."""
        y_t = y_t.contiguous()
        ctx.save_for_backward(y_t)
        ctx.table_shape, ctx.table_dtype = table.shape, table.dtype
        ctx.layout, ctx.deterministic = layout, deterministic
        return launch_embed(y_t, table, out_dtype, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the table; nothing else has one."""
        (y_t,) = ctx.saved_tensors
        deterministic = ctx.deterministic or torch.are_deterministic_algorithms_enabled()
        result = table_gradient(
            gradient.contiguous(),
            y_t.view(-1),
            tuple(ctx.table_shape),
            ctx.table_dtype,
            ctx.layout,
            plane_sizes(y_t, ctx.layout),
            deterministic,
        )
        return None, result, None, None, None


_POINTERS = {"out_ptr": "*fp32:16", "y_ptr": "*i64:16", "table_ptr": "*fp32:16", "transposed_ptr": "*fp32:16"}
_TEXT = {"LAYOUT": "tokens", "C": 1, "P": 1, "S": 1}
_ROWS = {"num_rows": "i32:16", "num_values": "i32"}
_PIXELS = {"E": 48, "P": 1024, "S": 2}

COMPILE_CASES = [
    *(
        CompileCase(
            f"embed tokens, {num_columns} columns",
            side_by_side_kernel,
            _POINTERS | _ROWS,
            _TEXT | {"E": num_columns, "ROWS": TILE // columns, "COLUMNS": columns},
        )
        for num_columns, columns in ((192, 64), (768, 256))
    ),
    CompileCase(
        "embed images, channels last, bf16",
        side_by_side_kernel,
        _POINTERS | _ROWS | {"out_ptr": "*bf16:16"},
        _PIXELS | {"LAYOUT": "channels_last", "C": 3, "ROWS": TILE // 16, "COLUMNS": 16},
    ),
    CompileCase(
        "embed images, channels first, bf16",
        channels_first_kernel,
        _POINTERS | {"num_values": "i32", "out_ptr": "*bf16:16"},
        _PIXELS | {"PIXEL_BLOCK": PIXEL_BLOCK, "COLUMN_BLOCK": COLUMN_BLOCK},
    ),
]
