"""What the kernels of the draws share: scores of tokens after carry-over, and the order of scores.

Shapes: V tokens, S digits a token; SP is S rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_due(due_ptr, row, stride_row, stride_digit, S: tl.constexpr, SP: tl.constexpr):
    """Return which digits (SP,) of a row are due, as int32."""
    digit = tl.arange(0, SP)
    pointers = due_ptr + row * stride_row + digit * stride_digit
    return tl.load(pointers, mask=digit < S, other=0).to(tl.int32)


@triton.jit
def shifts(S: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr):
    """Return the lowest bit (SP,) of every digit in a packed number."""
    return tl.maximum(S - 1 - tl.arange(0, SP), 0).to(tl.int64) * BITS


@triton.jit
def visible(y_ptr, stride_digit, mask_index, S: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr):
    """Return what tokens must agree with: (want, care), int64; see `kernels.token_digits`."""
    digit = tl.arange(0, SP)
    y = tl.load(y_ptr + digit * stride_digit, mask=digit < S, other=0).to(tl.int64)
    shown = (digit < S) & (y != mask_index)
    shift = shifts(S, SP, BITS)
    full = tl.full([SP], (1 << BITS) - 1, tl.int64)
    return tl.sum(tl.where(shown, y << shift, 0)), tl.sum(tl.where(shown, full << shift, 0))


@triton.jit
def load_logits(row_ptr, stride, columns, V):
    """Return logits as float32, -inf beyond V."""
    return tl.load(row_ptr + columns.to(tl.int64) * stride, mask=columns < V, other=float("-inf")).to(
        tl.float32
    )


@triton.jit
def carry_over(logits, packed_ptr, columns, V, want, care):
    """Return the logits of the tokens that agree with the visible digits, -inf for the others, NaN and +inf."""
    logits = tl.where(logits < float("inf"), logits, float("-inf"))
    if care != 0:  # the same for a whole program: rows with nothing visible do not read the table
        packed = tl.load(packed_ptr + columns, mask=columns < V, other=0)
        differs = (packed ^ want.to(packed.dtype)) & care.to(packed.dtype)
        logits = tl.where(differs != 0, float("-inf"), logits)
    return logits


@triton.jit
def order_key(scores):
    """Return integers in the order of float32 scores, equal for equal scores."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 equals 0
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def score_of_key(key):
    """Return the float32 score of an integer of `order_key`."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(temperature):
    """Return log2(e) / temperature, so that weights are exp2(scale (score - best)); temperature 0 counts as 1."""
    positive = tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(1.0 / positive, 1e38) * 1.4426950408889634


@triton.jit
def weights_of(scores, best, scale):
    """Return exp2(scale (scores - best)); 0 where a score is -inf, whatever is the best."""
    return tl.exp2((scores - tl.where(best == float("-inf"), 0.0, best)) * scale)


@triton.jit
def first_above(cumulative, mass, target, BLOCK: tl.constexpr):
    """Return the first index with mass whose cumulative sum exceeds the target; the last with mass if none does."""
    index = tl.arange(0, BLOCK)
    first = tl.min(tl.where((cumulative > target) & (mass > 0), index, BLOCK))
    return tl.minimum(first, tl.max(tl.where(mass > 0, index, 0)))
