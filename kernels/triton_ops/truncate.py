"""Where top-k and top-p cut a row off: without a sort.

Shapes: R rows, V tokens, S digits a token, W ways of a search.

The tokens of a row are ranked by score, of equals the lowest id first. The cut is the last token that is kept: its
score, as an integer in the order of float32 numbers, and its id. One program finds it for one row, by a search over the
2^32 bit patterns of a score in W = 16 ways: each pass counts the tokens (top-k), or sums their weights (top-p), at or
above 15 pivots; the range shrinks to a sixteenth, so 8 passes always end it. One more pass finds the id among equals.
Weights are summed in an order that depends on V only, and rounding is monotonic, so the sums at rising pivots never
rise. Rows that are not truncated end at once.

Bytes: 4 V of logits from memory once, and up to 18 (10 where only one of top-k and top-p is asked for) passes over them
from the L2 cache; 2 V of packed digits likewise. FLOPs: about 3 W V a pass. The floor is the cache: 2 MB to 4 MB a row
at V = 50257.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.token_digits import TokenDigits
from kernels.triton_ops.compile_case import CompileCase
from kernels.triton_ops.launch import on_its_device
from kernels.triton_ops.scores import (
    carry_over,
    is_due,
    load_logits,
    order_key,
    scale_of,
    score_of_key,
    visible,
    weights_of,
)


@triton.jit
def _amounts(
    row_ptr, stride, packed_ptr, want, care, best, scale, pivots,
    V: tl.constexpr, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Return how many tokens, or how much of their weight, is at or above each pivot (W,): float64."""
    sums = tl.zeros([CHUNK, WAYS], tl.float32)
    for start in range(0, V, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        scores = carry_over(load_logits(row_ptr, stride, columns, V), packed_ptr, columns, V, want, care)
        keys = order_key(scores)
        if WEIGHTED:
            amount = weights_of(scores, best, scale)
        else:
            amount = tl.full([CHUNK], 1.0, tl.float32)
        sums += tl.where(keys[:, None] >= pivots[None, :], amount[:, None], 0.0)
    return tl.sum(sums.to(tl.float64), axis=0)


@triton.jit
def _search(
    row_ptr, stride, packed_ptr, want, care, best, scale, low, high, limit,
    V: tl.constexpr, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Return the largest key with at least `limit` at or above it, and what is above it.

    There is enough at or above `low`, nothing at or above `high`; both int64.
    """
    way = tl.arange(0, WAYS)
    above = tl.zeros([], tl.float64)
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        pivots = low + step * way
        amounts = _amounts(
            row_ptr,
            stride,
            packed_ptr,
            want,
            care,
            best,
            scale,
            pivots.to(tl.int32),
            V,
            WEIGHTED,
            CHUNK,
            WAYS,
        )
        num_enough = tl.sum(((amounts >= limit) | (way == 0)).to(tl.int32))
        next_high = low + step * num_enough
        above = tl.where(
            (next_high < high) & (num_enough < WAYS), tl.sum(tl.where(way == num_enough, amounts, 0.0)), above
        )
        low = low + step * (num_enough - 1)
        high = tl.minimum(high, next_high)
    return low, above


@triton.jit
def cut_kernel(
    logits_ptr, y_ptr, positions_ptr, due_ptr, packed_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    cut_ptr, last_ptr,
    mask_index, stride_row, stride_column, stride_y_row, stride_y_digit, stride_due_row, stride_due_digit,
    V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr, CARRY_OVER: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_K: tl.constexpr, HAS_P: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Write where one row is cut off."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.full([], V, tl.int32)
    if HAS_K:
        k = tl.load(top_k_ptr + row)
        k = tl.where((k <= 0) | (k > V), V, k).to(tl.int32)
    p = tl.full([], 1.0, tl.float32)
    if HAS_P:
        p = tl.load(top_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    scale = scale_of(temperature)
    needed = tl.max(is_due(due_ptr, row, stride_due_row, stride_due_digit, S, SP)) > 0
    tl.store(cut_ptr + row, -(2**31))
    tl.store(last_ptr + row, V)
    if needed & (temperature > 0) & ((k < V) | (p < 1.0)):
        row_ptr = logits_ptr + row * stride_row
        want = tl.zeros([], tl.int64)
        care = tl.zeros([], tl.int64)
        if CARRY_OVER:
            position = row
            if HAS_POSITIONS:
                position = tl.load(positions_ptr + row)
            want, care = visible(y_ptr + position * stride_y_row, stride_y_digit, mask_index, S, SP, BITS)

        largest = tl.full([CHUNK], float("-inf"), tl.float32)
        least = tl.full([CHUNK], float("inf"), tl.float32)
        number = tl.zeros([CHUNK], tl.int32)
        for start in range(0, V, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            scores = carry_over(
                load_logits(row_ptr, stride_column, columns, V), packed_ptr, columns, V, want, care
            )
            largest = tl.maximum(largest, scores)
            possible = scores > float("-inf")
            least = tl.where(possible, tl.minimum(least, scores), least)
            number += possible.to(tl.int32)
        best = tl.max(largest)
        low = order_key(tl.min(least)).to(tl.int64)
        high = order_key(best).to(tl.int64) + 1
        # A row that is not finite may come here: whatever it finds is not used, and every loop ends.

        cut = low
        above = tl.zeros([], tl.float64)
        limit = tl.full([], float("inf"), tl.float64)
        room = tl.full([], V, tl.int32)
        if HAS_K:
            if k < tl.sum(number):
                cut, above = _search(
                    row_ptr, stride_column, packed_ptr, want, care, best, scale, low, high, k.to(tl.float64),
                    V, False, CHUNK, WAYS,
                )  # fmt: skip
                room = k - above.to(tl.int32)
        if HAS_P:
            if p < 1.0:
                # The mass of what top-k kept: that above its cut, and of equals at the cut as many as it has room for.
                way = tl.arange(0, WAYS)
                pivots = tl.where(way == 0, cut, cut + 1).to(tl.int32)
                masses = _amounts(
                    row_ptr, stride_column, packed_ptr, want, care, best, scale, pivots, V, True, CHUNK, WAYS
                )
                at_least = tl.sum(tl.where(way == 0, masses, 0.0))
                beyond = tl.sum(tl.where(way == 1, masses, 0.0))
                weight = weights_of(score_of_key(cut.to(tl.int32)), best, scale).to(tl.float64)
                total = tl.where(room < V, beyond + room * weight, at_least)
                limit = p.to(tl.float64) * total
                top_k_cut = cut
                cut, above = _search(
                    row_ptr, stride_column, packed_ptr, want, care, best, scale, cut, high, limit,
                    V, True, CHUNK, WAYS,
                )  # fmt: skip
                above = tl.where(cut == top_k_cut, beyond, above)
                room = tl.where(cut == top_k_cut, room, V)

        # Of equals at the cut the first are kept: at most `room`, and those before which the mass is short of p.
        key = cut.to(tl.int32)
        weight = weights_of(score_of_key(key), best, scale).to(tl.float64)
        seen = 0
        last = -1
        for start in range(0, V, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            scores = carry_over(
                load_logits(row_ptr, stride_column, columns, V), packed_ptr, columns, V, want, care
            )
            equal = ((order_key(scores) == key) & (columns < V)).to(tl.int32)
            rank = seen + tl.cumsum(equal, 0)
            kept = (equal > 0) & (rank <= room)
            if HAS_P:
                kept = kept & (above + (rank - 1) * weight < limit)
            last = tl.maximum(last, tl.max(tl.where(kept, columns, -1)))
            seen += tl.sum(equal)
        tl.store(cut_ptr + row, key)
        tl.store(last_ptr + row, last)


@on_its_device
def launch_cut(
    logits: Tensor,
    y: Tensor,
    positions: Tensor | None,
    due: Tensor,
    tokens: TokenDigits,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    *,
    carry_over: bool,
) -> tuple[Tensor, Tensor]:
    """Return the last token of every row that is kept: its key and its id, both (R,) int32.

    Args:
        logits: (R, V).
        y: (R, S), or the state (T, S) of which ``positions`` are the rows.
        positions: (R,) int64 or None.
        due: (R, S) bool.
        tokens: digits of every token.
        temperature: (R,) float32.
        top_k: (R,) int64 or None.
        top_p: (R,) float32 or None.
        carry_over: whether tokens that contradict the visible digits have no rank.
    """
    num_rows, vocab_size = logits.shape
    # Not two rows of one tensor: Triton compiles a kernel again for a pointer that is not aligned to 16 bytes.
    cut, last = (torch.empty(num_rows, dtype=torch.int32, device=logits.device) for _ in range(2))
    cut_kernel[(num_rows,)](
        logits,
        y,
        positions,
        due,
        tokens.packed,
        temperature,
        top_k,
        top_p,
        cut,
        last,
        tokens.mask_index,
        *logits.stride(),
        *y.stride(),
        *due.stride(),
        V=vocab_size,
        S=tokens.num_digits,
        SP=triton.next_power_of_2(tokens.num_digits),
        BITS=tokens.num_bits,
        CARRY_OVER=carry_over,
        HAS_POSITIONS=positions is not None,
        HAS_K=top_k is not None,
        HAS_P=top_p is not None,
        CHUNK=chunk_size(vocab_size),
        WAYS=16,
        num_warps=num_warps(vocab_size),
    )
    return cut, last


def chunk_size(vocab_size: int) -> int:
    """Return how many tokens of a row are looked at together."""
    size: int = min(1024, triton.next_power_of_2(vocab_size))
    return size


def num_warps(vocab_size: int) -> int:
    """Return the warps of a program."""
    return 16 if vocab_size > 512 else 4


def _case(name: str, vocab_size: int, num_digits: int, bits: int, logits: str, **flags: bool) -> CompileCase:
    types = {
        "logits_ptr": f"*{logits}:16", "y_ptr": "*i64:16", "positions_ptr": "*i64:16", "due_ptr": "*i1:16",
        "packed_ptr": "*i16:16", "temperature_ptr": "*fp32:16", "top_k_ptr": "*i64:16", "top_p_ptr": "*fp32:16",
        "cut_ptr": "*i32:16", "last_ptr": "*i32:16", "mask_index": "i32", "stride_row": "i32",
        "stride_y_row": "i32", "stride_due_row": "i32",
    }  # fmt: skip
    constants = {
        "stride_column": 1, "stride_y_digit": 1, "stride_due_digit": 1, "V": vocab_size, "S": num_digits,
        "SP": triton.next_power_of_2(num_digits), "BITS": bits, "CARRY_OVER": True, "HAS_POSITIONS": True,
        "HAS_K": True, "HAS_P": True, "CHUNK": chunk_size(vocab_size), "WAYS": 16,
    } | flags  # fmt: skip
    return CompileCase(f"cut {name}", cut_kernel, types, constants, num_warps(vocab_size))


COMPILE_CASES = [
    _case("V=50257 S=4 fp32", 50257, 4, 4, "fp32"),
    _case("V=50257 S=4 bf16", 50257, 4, 4, "bf16"),
    _case("V=50257 S=4 fp32 beside", 50257, 4, 4, "fp32", HAS_POSITIONS=False),
    _case("V=50257 S=4 fp32 top-p", 50257, 4, 4, "fp32", HAS_K=False),
    _case("V=50257 S=1 fp32", 50257, 1, 16, "fp32"),
    _case("V=256 S=2 fp32", 256, 2, 4, "fp32"),
    _case("V=256 S=2 fp32 digits alone", 256, 2, 4, "fp32", CARRY_OVER=False),
]
