"""Kernels of `kernels.rows`: stable compaction of a mask, and row copies that end at a count on the device.

Shapes: B rows, N places, W words of a row.

`compact_rows` is one program: B is a batch, or the token positions of one (10^5 at most). It reads B bytes and writes
8 B, twice over the mask; the floor is a launch. The copies have a program per place and block of words, which reads the
count (8 bytes, cached) and stops if its place is beyond it. They move 2 W words a copied row: 64 rows of 1024 x 768
bfloat16 are 201 MB, 67 us at 3 TB/s. No FLOPs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_ops.compile_case import CompileCase

_BLOCK_ROWS = 1024
_BLOCK_WORDS = 2048
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def compact_rows_kernel(changed_ptr, indices_ptr, count_ptr, num_rows, BLOCK: tl.constexpr):
    """One program: count, then place every row."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while first < num_rows:
        row = first + lane
        total += tl.sum(tl.load(changed_ptr + row, row < num_rows, other=0).to(tl.int32), 0)
        first += BLOCK
    tl.store(count_ptr, total.to(tl.int64))
    before = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while first < num_rows:
        row = first + lane
        changed = tl.load(changed_ptr + row, row < num_rows, other=0).to(tl.int32)
        rank = before + tl.cumsum(changed, 0) - changed  # changed rows in front of this one
        place = tl.where(changed != 0, rank, total + row - rank)
        tl.store(indices_ptr + place, row.to(tl.int64), row < num_rows)
        before += tl.sum(changed, 0)
        first += BLOCK


@triton.jit
def copy_rows_kernel(
    source_ptr, target_ptr, indices_ptr, count_ptr, num_words, SCATTER: tl.constexpr, BLOCK: tl.constexpr
):
    """One place and one block of its words."""
    place = tl.program_id(0).to(tl.int64)
    if place < tl.load(count_ptr):
        index = tl.load(indices_ptr + place)
        source_row = place if SCATTER else index
        target_row = index if SCATTER else place
        word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = word < num_words
        words = tl.load(source_ptr + source_row * num_words + word, inside)
        tl.store(target_ptr + target_row * num_words + word, words, inside)


def launch_compact_rows(changed: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and count; arguments as `kernels.rows.compact_rows`."""
    indices = torch.empty(len(changed), dtype=torch.int64, device=changed.device)
    count = torch.empty(1, dtype=torch.int64, device=changed.device)
    mask = changed.contiguous().view(torch.uint8)
    with torch.cuda.device_of(changed):
        compact_rows_kernel[(1,)](mask, indices, count, len(changed), BLOCK=_BLOCK_ROWS, num_warps=4)
    return indices, count


def launch_copy_rows(
    source: Tensor, target: Tensor, indices: Tensor, count: Tensor, *, scatter: bool
) -> None:
    """Copy rows between a batch and a smaller one; arguments as `gather_rows` and `scatter_rows`."""
    num_places = len(source) if scatter else len(target)
    if source.numel() == 0 or target.numel() == 0:
        return
    source, target = _as_words(source, target)
    num_words = source.shape[1]
    block = min(_BLOCK_WORDS, triton.next_power_of_2(num_words))
    with torch.cuda.device_of(source):
        copy_rows_kernel[(num_places, triton.cdiv(num_words, block))](
            source, target, indices.contiguous(), count, num_words, SCATTER=scatter, BLOCK=block, num_warps=4
        )


def _as_words(*batches: Tensor) -> tuple[Tensor, ...]:
    """(B, W) each: their rows as integers of one width, eight bytes where size and address allow it."""
    flat = [rows.flatten(1) if rows.ndim > 1 else rows[:, None] for rows in batches]
    size = flat[0].element_size()
    wide = flat[0].shape[1] * size % 8 == 0 and all(rows.data_ptr() % 8 == 0 for rows in flat)
    return tuple(rows.view(_WORDS[8 if wide else size]) for rows in flat)


COMPILE_CASES = [
    CompileCase(
        "compact_rows",
        compact_rows_kernel,
        {"changed_ptr": "*u8:16", "indices_ptr": "*i64:16", "count_ptr": "*i64:16", "num_rows": "i32:16"},
        {"BLOCK": _BLOCK_ROWS},
    ),
    *(
        CompileCase(
            f"{name} words of {word}",
            copy_rows_kernel,
            {
                "source_ptr": f"*{word}:16",
                "target_ptr": f"*{word}:16",
                "indices_ptr": "*i64:16",
                "count_ptr": "*i64:16",
                "num_words": "i32:16",
            },
            {"SCATTER": name == "scatter_rows", "BLOCK": _BLOCK_WORDS},
        )
        for name in ("gather_rows", "scatter_rows")
        for word in ("i64", "i16")
    ),
]
