"""Draw tokens and write their digits: `kernels.reveal` in two kernels, three where rows are truncated.

Shapes: R rows, V tokens, S digits a token, N blocks of a row; SP and NP are S and N rounded up to powers of two.

1. `block_mass_kernel`, R N programs: the largest score of a block, and the mass of the block relative to it. Where V is
   at most one block this kernel does not run.
2. `draw_kernel`, R programs: brings the masses of the blocks to one scale, draws a block, reads that block again, draws
   a token in it, and writes the digits that are due.

Rows that top-k or top-p cut off need `cut_kernel` first (`triton_ops.truncate`). Blocks and the order of sums depend on
V only, so no row's result depends on how many rows there are. Sums of weights are float64.

Bytes: 4 V of logits a row (2 V in bfloat16), read once; 2 V of packed digits where a digit is visible, from the L2
cache after the first row; 12 N of scratch; one block again. V = 50257, float32: 201 KB a row, 0.06 ms for 1,000 rows at
3.35 TB/s. FLOPs: about 6 V. The floor is the reading of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.token_digits import TokenDigits
from kernels.triton_ops.compile_case import CompileCase
from kernels.triton_ops.scores import (
    carry_over,
    first_above,
    is_due,
    load_logits,
    order_key,
    scale_of,
    shifts,
    visible,
    weights_of,
)
from kernels.triton_ops.truncate import launch_cut


@triton.jit
def _scores(
    row_ptr, stride, packed_ptr, cut_ptr, last_ptr, row, columns, V, want, care, TRUNCATED: tl.constexpr
):  # fmt: skip
    """Return scores after carry-over and truncation, and whether a logit of these is NaN or +inf."""
    logits = load_logits(row_ptr, stride, columns, V)
    bad = tl.max((logits < float("inf")).to(tl.int32) ^ 1)
    scores = carry_over(logits, packed_ptr, columns, V, want, care)
    if TRUNCATED:
        key = order_key(scores)
        cut = tl.load(cut_ptr + row)
        kept = (key > cut) | ((key == cut) & (columns <= tl.load(last_ptr + row)))
        scores = tl.where(kept, scores, float("-inf"))
    return scores, bad


@triton.jit
def block_mass_kernel(
    logits_ptr, y_ptr, positions_ptr, due_ptr, packed_ptr, temperature_ptr, cut_ptr, last_ptr, best_ptr, mass_ptr,
    V, N, mask_index, stride_row, stride_column, stride_y_row, stride_y_digit, stride_due_row, stride_due_digit,
    S: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr, HAS_POSITIONS: tl.constexpr, TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the largest score of one block, +inf if a logit is NaN or +inf, and its mass relative to that score."""
    program = tl.program_id(0)
    row = (program // N).to(tl.int64)
    block = program % N
    if tl.max(is_due(due_ptr, row, stride_due_row, stride_due_digit, S, SP)) > 0:
        position = row
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + row)
        want, care = visible(y_ptr + position * stride_y_row, stride_y_digit, mask_index, S, SP, BITS)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        scores, bad = _scores(
            logits_ptr + row * stride_row, stride_column, packed_ptr, cut_ptr, last_ptr, row, columns, V, want, care,
            TRUNCATED,
        )  # fmt: skip
        best = tl.max(scores)
        weights = weights_of(scores, best, scale_of(tl.load(temperature_ptr + row)))
        tl.store(best_ptr + row * N + block, tl.where(bad > 0, float("inf"), best))
        tl.store(mass_ptr + row * N + block, tl.sum(weights.to(tl.float64)))


@triton.jit
def _draw_block(best_ptr, mass_ptr, row, N, u, scale, greedy, NP: tl.constexpr):
    """Return the largest score of a row, the block at the quantile u, and at which share of its mass u is."""
    index = tl.arange(0, NP)
    bests = tl.load(best_ptr + row * N + index, mask=index < N, other=float("-inf"))
    masses = tl.load(mass_ptr + row * N + index, mask=index < N, other=0.0)
    usable = tl.where(bests < float("inf"), bests, float("-inf"))
    masses = masses * weights_of(usable, tl.max(usable), scale).to(tl.float64)
    best = tl.max(bests)
    target = u * tl.sum(masses)
    block = first_above(tl.cumsum(masses, 0), masses, target, NP)
    block = tl.where(greedy, tl.minimum(tl.min(tl.where(bests == best, index, NP)), N - 1), block)
    before = tl.sum(tl.where(index < block, masses, 0.0))
    mass = tl.sum(tl.where(index == block, masses, 0.0))
    return best, block, tl.maximum((target - before) / tl.where(mass > 0, mass, 1.0), 0.0)


@triton.jit
def draw_kernel(
    logits_ptr, y_ptr, positions_ptr, due_ptr, packed_ptr, u_ptr, temperature_ptr, cut_ptr, last_ptr,
    best_ptr, mass_ptr, finite_ptr, changed_ptr,
    V, N, mask_index, stride_row, stride_column, stride_y_row, stride_y_digit, stride_due_row, stride_due_digit,
    S: tl.constexpr, SP: tl.constexpr, BITS: tl.constexpr, HAS_POSITIONS: tl.constexpr, TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Draw the token of one row and write its digits that are due."""
    row = tl.program_id(0).to(tl.int64)
    due = is_due(due_ptr, row, stride_due_row, stride_due_digit, S, SP)
    needed = tl.max(due) > 0
    if needed:
        position = row
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + row)
        y_ptr += position * stride_y_row
        want, care = visible(y_ptr, stride_y_digit, mask_index, S, SP, BITS)
        temperature = tl.load(temperature_ptr + row)
        greedy = temperature == 0
        scale = scale_of(temperature)
        share = tl.load(u_ptr + row)
        block = 0
        if NP > 1:
            best, block, share = _draw_block(best_ptr, mass_ptr, row, N, share, scale, greedy, NP)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        scores, bad = _scores(
            logits_ptr + row * stride_row, stride_column, packed_ptr, cut_ptr, last_ptr, row, columns, V, want, care,
            TRUNCATED,
        )  # fmt: skip
        block_best = tl.max(scores)
        if NP == 1:
            best = tl.where(bad > 0, float("inf"), block_best)
        finite = (best > float("-inf")) & (best < float("inf"))
        weights = weights_of(scores, block_best, scale).to(tl.float64)
        inside = first_above(tl.cumsum(weights, 0), weights, share * tl.sum(weights), BLOCK)
        first_best = tl.min(tl.where(scores == block_best, tl.arange(0, BLOCK), BLOCK))
        inside = tl.where(greedy, first_best, inside)
        # Of a row that is not finite nothing is stored, but something is loaded.
        token = tl.minimum(block * BLOCK + inside, V - 1)
        digits = (tl.load(packed_ptr + token).to(tl.int64) >> shifts(S, SP, BITS)) & ((1 << BITS) - 1)
        tl.store(
            y_ptr + tl.arange(0, SP) * stride_y_digit,
            digits.to(y_ptr.dtype.element_ty),
            mask=tl.where(finite, due, 0) > 0,
        )
        tl.store(finite_ptr + row, finite)
        tl.store(changed_ptr + row, finite)
    else:
        tl.store(finite_ptr + row, True)
        tl.store(changed_ptr + row, False)


def launch_reveal(
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
        logits: (R, V).
        y: (R, S), or the state (T, S) of which ``positions`` are the rows; written.
        positions: (R,) int64 or None.
        due: (R, S) bool.
        tokens: digits of every token.
        u: (R,) float64.
        temperature: (R,) float32; None: 1 for every row.
        top_k: (R,) int64 or None.
        top_p: (R,) float32 or None.
    """
    num_rows, vocab_size = logits.shape
    # Each with an allocation of its own: Triton compiles a kernel again for a pointer that is not aligned to 16 bytes.
    finite, changed = (torch.empty(num_rows, dtype=torch.bool, device=logits.device) for _ in range(2))
    if num_rows == 0:
        return finite, changed
    temperature = torch.ones_like(u, dtype=torch.float32) if temperature is None else temperature.contiguous()
    u = u.contiguous()
    positions, top_k, top_p = (
        None if part is None else part.contiguous() for part in (positions, top_k, top_p)
    )
    with torch.cuda.device_of(logits):
        cut = last = None
        truncated = top_k is not None or top_p is not None
        if truncated:
            cut, last = launch_cut(
                logits, y, positions, due, tokens, temperature, top_k, top_p, carry_over=True
            )
        block_size = block_size_of(vocab_size)
        num_blocks = triton.cdiv(vocab_size, block_size)
        best = mass = None
        strides = (*logits.stride(), *y.stride(), *due.stride())
        sizes = (vocab_size, num_blocks, tokens.mask_index, *strides)
        constants = {
            "S": tokens.num_digits,
            "SP": triton.next_power_of_2(tokens.num_digits),
            "BITS": tokens.num_bits,
            "HAS_POSITIONS": positions is not None,
            "TRUNCATED": truncated,
            "BLOCK": block_size,
            "num_warps": num_warps(block_size),
        }
        inputs = (logits, y, positions, due, tokens.packed)
        if num_blocks > 1:
            best = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
            mass = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=logits.device)
            block_mass_kernel[(num_rows * num_blocks,)](
                *inputs, temperature, cut, last, best, mass, *sizes, **constants
            )
        draw_kernel[(num_rows,)](
            *inputs, u, temperature, cut, last, best, mass, finite, changed, *sizes,
            NP=triton.next_power_of_2(num_blocks), **constants,
        )  # fmt: skip
    return finite, changed


def block_size_of(vocab_size: int) -> int:
    """Return the tokens of a block: one block for small vocabularies, else so few that one row keeps many programs."""
    size: int = triton.next_power_of_2(vocab_size) if vocab_size <= 4096 else 2048
    return size


def num_warps(block_size: int) -> int:
    """Return the warps of a program: 16 elements a thread, no more than 8 warps."""
    return max(1, min(8, block_size // 512))


def _cases(
    name: str,
    vocab_size: int,
    num_digits: int,
    bits: int,
    logits: str,
    *,
    truncated: bool,
    in_place: bool = True,
) -> list[CompileCase]:
    block_size = block_size_of(vocab_size)
    num_blocks = triton.cdiv(vocab_size, block_size)
    types = {
        "logits_ptr": f"*{logits}:16", "y_ptr": "*i64:16", "positions_ptr": "*i64:16", "due_ptr": "*i1:16",
        "packed_ptr": "*i16:16", "u_ptr": "*fp64:16", "temperature_ptr": "*fp32:16", "cut_ptr": "*i32:16",
        "last_ptr": "*i32:16", "best_ptr": "*fp32:16", "mass_ptr": "*fp64:16", "finite_ptr": "*i1:16",
        "changed_ptr": "*i1:16", "V": "i32", "N": "i32", "mask_index": "i32", "stride_row": "i32",
        "stride_y_row": "i32", "stride_due_row": "i32",
    }  # fmt: skip
    constants = {
        "stride_column": 1, "stride_y_digit": 1, "stride_due_digit": 1, "S": num_digits,
        "SP": triton.next_power_of_2(num_digits), "BITS": bits, "HAS_POSITIONS": in_place, "TRUNCATED": truncated,
        "BLOCK": block_size, "NP": triton.next_power_of_2(num_blocks),
    }  # fmt: skip
    name = f"{name} {logits}{' truncated' if truncated else ''}{'' if in_place else ' beside'}"
    kernels = [("draw", draw_kernel)] + [("block mass", block_mass_kernel)] * (num_blocks > 1)
    return [
        CompileCase(
            f"{kind} {name}",
            kernel,
            types,
            {key: value for key, value in constants.items() if key in kernel.arg_names},
            num_warps(block_size),
        )
        for kind, kernel in kernels
    ]


COMPILE_CASES = [
    case
    for name, vocab_size, num_digits, bits, logits in (
        ("V=50257 S=4", 50257, 4, 4, "fp32"),
        ("V=50257 S=4", 50257, 4, 4, "bf16"),
        ("V=50257 S=1", 50257, 1, 16, "fp32"),
        ("V=50257 S=1", 50257, 1, 16, "bf16"),
        ("V=256 S=2", 256, 2, 4, "fp32"),
    )
    for truncated in (False, True)
    for case in _cases(name, vocab_size, num_digits, bits, logits, truncated=truncated)
] + _cases("V=50257 S=4", 50257, 4, 4, "fp32", truncated=True, in_place=False)
