"""Draw every digit of a token alone: `kernels.marginal` in one kernel, two where rows are truncated.

Shapes: R rows, V tokens, S digits a token, b = base; VP, SP and are V and S rounded up to powers of two.

One program keeps the weights of a row in registers. Where the codec has no permutation and b is a power of two, the
marginal of digit j is a sum over a view (b^j, b, b^(S-1-j)) of them. Else the tokens are read again in the order of
their digit j, equal digits side by side: the inverse CDF over tokens then picks the digit that the inverse CDF over
digits picks. Sums are float64, and their order depends on V only.

Bytes: 4 V of logits a row (2 V in bfloat16), read once from memory; with a permutation again from the cache for every
digit that is due, with 8 V of token ids. FLOPs: about (4 + S) V. The floor is the reading of the logits: V = 256,
float32: 1 KB a row, 0.9 us for 3,072 rows at 3.35 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.token_digits import TokenDigits
from kernels.triton_ops.compile_case import CompileCase
from kernels.triton_ops.scores import (
    first_above,
    is_due,
    load_logits,
    order_key,
    scale_of,
    shifts,
    weights_of,
)
from kernels.triton_ops.truncate import launch_cut


@triton.jit
def _kept_weights(
    row_ptr, stride, cut_ptr, last_ptr, row, columns, V, best, scale, TRUNCATED: tl.constexpr
):  # fmt: skip
    """Return the weights of tokens in any order, float64; 0 for those that are cut off."""
    scores = load_logits(row_ptr, stride, columns, V)
    scores = tl.where(scores < float("inf"), scores, float("-inf"))
    weights = weights_of(scores, best, scale)
    if TRUNCATED:
        key = order_key(scores)
        cut = tl.load(cut_ptr + row)
        kept = (key > cut) | ((key == cut) & (columns <= tl.load(last_ptr + row)))
        weights = tl.where(kept, weights, 0.0)
    return weights.to(tl.float64)


@triton.jit
def marginal_kernel(
    logits_ptr, y_ptr, positions_ptr, due_ptr, packed_ptr, order_ptr, u_ptr, temperature_ptr, cut_ptr, last_ptr,
    finite_ptr, changed_ptr,
    V, stride_row, stride_column, stride_y_row, stride_y_digit, stride_due_row, stride_due_digit,
    stride_u_row, stride_u_digit,
    S: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr, HAS_POSITIONS: tl.constexpr, TRUNCATED: tl.constexpr,
    IN_ORDER: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """Draw the digits of one row that are due."""
    row = tl.program_id(0).to(tl.int64)
    due = is_due(due_ptr, row, stride_due_row, stride_due_digit, S, SP)
    if tl.max(due) > 0:
        row_ptr = logits_ptr + row * stride_row
        index = tl.arange(0, VP)
        logits = load_logits(row_ptr, stride_column, index, V)
        bad = tl.max((logits < float("inf")).to(tl.int32) ^ 1) > 0
        best = tl.max(tl.where(logits < float("inf"), logits, float("-inf")))
        finite = (best > float("-inf")) & (bad == 0)
        temperature = tl.load(temperature_ptr + row)
        scale = scale_of(temperature)
        if HAS_POSITIONS:
            y_ptr += tl.load(positions_ptr + row) * stride_y_row
        else:
            y_ptr += row * stride_y_row
        if temperature == 0:
            token = tl.minimum(tl.min(tl.where(logits == best, index, VP)), V - 1)
            digits = (tl.load(packed_ptr + token).to(tl.int64) >> shifts(S, SP, BITS)) & ((1 << BITS) - 1)
            pointers = y_ptr + tl.arange(0, SP) * stride_y_digit
            tl.store(pointers, digits.to(y_ptr.dtype.element_ty), mask=tl.where(finite, due, 0) > 0)
        else:
            for digit in tl.static_range(S):
                if tl.load(due_ptr + row * stride_due_row + digit * stride_due_digit).to(tl.int32) > 0:
                    u = tl.load(u_ptr + row * stride_u_row + digit * stride_u_digit)
                    if IN_ORDER:
                        weights = _kept_weights(
                            row_ptr, stride_column, cut_ptr, last_ptr, row, index, V, best, scale, TRUNCATED
                        )
                        shape: tl.constexpr = [1 << digit * BITS, 1 << BITS, 1 << (S - 1 - digit) * BITS]
                        mass = tl.sum(tl.sum(tl.reshape(weights, shape), 2), 0)
                        value = first_above(tl.cumsum(mass, 0), mass, u * tl.sum(mass), 1 << BITS)
                    else:
                        tokens = tl.load(order_ptr + digit * V + index, mask=index < V, other=V)
                        mass = _kept_weights(
                            row_ptr, stride_column, cut_ptr, last_ptr, row, tokens, V, best, scale, TRUNCATED
                        )
                        place = first_above(tl.cumsum(mass, 0), mass, u * tl.sum(mass), VP)
                        token = tl.load(order_ptr + digit * V + tl.minimum(place, V - 1))
                        packed = tl.load(packed_ptr + token).to(tl.int64)
                        value = (packed >> (S - 1 - digit) * BITS) & ((1 << BITS) - 1)
                    tl.store(y_ptr + digit * stride_y_digit, value.to(y_ptr.dtype.element_ty), mask=finite)
        tl.store(finite_ptr + row, finite)
        tl.store(changed_ptr + row, finite)
    else:
        tl.store(finite_ptr + row, True)
        tl.store(changed_ptr + row, False)


def launch_marginal(
    logits: Tensor,
    y: Tensor,
    positions: Tensor | None,
    due: Tensor,
    tokens: TokenDigits,
    u: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write the digits that are due in place; return which rows are finite, and which changed, both (R,) bool.

    Args:
        logits: (R, V), V at most 4,096: a row is kept in registers.
        y: (R, S), or the state (T, S) of which ``positions`` are the rows; written.
        positions: (R,) int64 or None.
        due: (R, S) bool.
        tokens: digits of every token.
        u: (R, S) float64.
        temperature: (R,) float32; None: 1 for every row.
        top_k: (R,) int64 or None.
        top_p: (R,) float32 or None.
    """
    num_rows, vocab_size = logits.shape
    # Each with an allocation of its own: Triton compiles a kernel again for a pointer that is not aligned to 16 bytes.
    finite, changed = (torch.empty(num_rows, dtype=torch.bool, device=logits.device) for _ in range(2))
    if num_rows == 0:
        return finite, changed
    temperature = u.new_ones(len(u), dtype=torch.float32) if temperature is None else temperature.contiguous()
    positions, top_k, top_p = (
        None if part is None else part.contiguous() for part in (positions, top_k, top_p)
    )
    in_order = tokens.in_order and tokens.mask_index == 1 << tokens.num_bits
    size = triton.next_power_of_2(vocab_size)
    with torch.cuda.device_of(logits):
        cut = last = None
        truncated = top_k is not None or top_p is not None
        if truncated:
            cut, last = launch_cut(
                logits, y, positions, due, tokens, temperature, top_k, top_p, carry_over=False
            )
        marginal_kernel[(num_rows,)](
            logits, y, positions, due, tokens.packed, None if in_order else tokens.by_digit, u, temperature,
            cut, last, finite, changed,
            vocab_size, *logits.stride(), *y.stride(), *due.stride(), *u.stride(),
            S=tokens.num_digits, SP=triton.next_power_of_2(tokens.num_digits), BITS=tokens.num_bits,
            HAS_POSITIONS=positions is not None, TRUNCATED=truncated, IN_ORDER=in_order, VP=size,
            num_warps=num_warps(size),
        )  # fmt: skip
    return finite, changed


def num_warps(size: int) -> int:
    """Return the warps of a program: 8 elements a thread, no more than 8 warps."""
    return max(1, min(8, size // 256))


def _case(name: str, vocab_size: int, num_digits: int, bits: int, **flags: bool) -> CompileCase:
    types = {
        "logits_ptr": "*fp32:16", "y_ptr": "*i64:16", "positions_ptr": "*i64:16", "due_ptr": "*i1:16",
        "packed_ptr": "*i16:16", "order_ptr": "*i64:16", "u_ptr": "*fp64:16", "temperature_ptr": "*fp32:16",
        "cut_ptr": "*i32:16", "last_ptr": "*i32:16", "finite_ptr": "*i1:16", "changed_ptr": "*i1:16", "V": "i32:16",
        "stride_row": "i32:16", "stride_y_row": "i32", "stride_due_row": "i32", "stride_u_row": "i32",
    }  # fmt: skip
    constants = {
        "stride_column": 1, "stride_y_digit": 1, "stride_due_digit": 1, "stride_u_digit": 1, "S": num_digits,
        "SP": triton.next_power_of_2(num_digits), "BITS": bits, "HAS_POSITIONS": True, "TRUNCATED": False,
        "IN_ORDER": True, "VP": vocab_size,
    } | flags  # fmt: skip
    return CompileCase(f"marginal {name}", marginal_kernel, types, constants, num_warps(vocab_size))


COMPILE_CASES = [
    _case("V=256 S=2", 256, 2, 4),
    _case("V=256 S=2 truncated", 256, 2, 4, TRUNCATED=True),
    _case("V=256 S=2 beside", 256, 2, 4, HAS_POSITIONS=False),
    _case("V=256 S=2 permuted truncated", 256, 2, 4, IN_ORDER=False, TRUNCATED=True),
    _case("V=256 S=4", 256, 4, 2),
    _case("V=256 S=8", 256, 8, 1),
    _case("V=4096 S=1", 4096, 1, 12),
    _case("V=4096 S=2", 4096, 2, 6),
    _case("V=4096 S=2 permuted truncated", 4096, 2, 6, IN_ORDER=False, TRUNCATED=True),
]
