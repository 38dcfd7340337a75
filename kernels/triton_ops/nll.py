"""Log-sum-exps of logits over sets of tokens, and their gradient: kernels of `kernels.nll` and `kernels.linear_nll`.

Shapes: R rows, V tokens, K sets a row, the first of which holds the others (`kernels.token_sets.TokenSets`).

Forward: one program a row sweeps the V logits once. One exp a token, around the running maximum of set 0, serves all
K sums; where a set's sum vanishes next to that maximum (its tokens are over 69 nats below), the row is swept once more
with a maximum a set. Floor: R V (bytes of a logit) from memory, R V (bytes of a packed code) from cache; R V (1 exp +
about 3 K + 5 operations).
Backward: one program a row and block reads and writes each logit once, in place if asked to. Floor: 2 R V (bytes of
a logit) from and to memory, R V (bytes of a packed code) from cache; operations as above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.token_sets import TokenSets, wide_dtype
from kernels.triton_ops.compile_case import CompileCase
from kernels.triton_ops.launch import on_its_device


@triton.jit
def _set_lse_kernel(
    logits_ptr,
    packed_ptr,
    code_ptr,
    masks_ptr,
    lse_ptr,
    logits_stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_SETS: tl.constexpr,
    SUBSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sweep one row: SUBSETS is NUM_SETS - 1 rounded up to a power of two, at least 1."""
    row = tl.program_id(0).to(tl.int64)
    code = tl.load(code_ptr + row)
    whole = tl.load(masks_ptr + row * NUM_SETS)
    k = tl.arange(0, SUBSETS)
    subset = tl.load(masks_ptr + row * NUM_SETS + 1 + k, mask=k < NUM_SETS - 1, other=0)
    best = float("-inf")
    pivot = 0.0
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((SUBSETS, BLOCK), tl.float32)
    for first in range(0, VOCAB_SIZE, BLOCK):
        x, differ = _load_block(
            logits_ptr + row * logits_stride, packed_ptr, code, whole, first, VOCAB_SIZE, BLOCK
        )
        new_best = tl.maximum(best, tl.max(x, 0))
        pivot = tl.where(new_best == float("-inf"), 0.0, new_best)  # -inf - -inf is not a number
        scale = tl.exp(best - pivot)
        terms = tl.exp(x - pivot)
        total = total * scale + terms
        if NUM_SETS > 1:
            agrees = (differ[None, :] & subset[:, None]) == 0
            sums = sums * scale + tl.where(agrees, terms[None, :], 0.0)
        best = new_best
    tl.store(lse_ptr + row * NUM_SETS, _log(tl.sum(total, 0)) + pivot)
    if NUM_SETS > 1:
        part = tl.sum(sums, 1)
        lse = _log(part) + pivot
        lost = tl.max((part < 1e-30).to(tl.int32), 0)
        if lost > 0:
            lse = _sweep_apart(
                logits_ptr + row * logits_stride, packed_ptr, code, whole, subset, VOCAB_SIZE, SUBSETS, BLOCK
            )
        tl.store(lse_ptr + row * NUM_SETS + 1 + k, lse, mask=k < NUM_SETS - 1)


@triton.jit
def _sweep_apart(
    row_ptr,
    packed_ptr,
    code,
    whole,
    subset,
    VOCAB_SIZE: tl.constexpr,
    SUBSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the log-sum-exps of the subsets, each around its own maximum: one exp a token and subset."""
    best = tl.full((SUBSETS,), float("-inf"), tl.float32)
    pivot = tl.zeros((SUBSETS,), tl.float32)
    total = tl.zeros((SUBSETS,), tl.float32)
    for first in range(0, VOCAB_SIZE, BLOCK):
        x, differ = _load_block(row_ptr, packed_ptr, code, whole, first, VOCAB_SIZE, BLOCK)
        own = tl.where((differ[None, :] & subset[:, None]) == 0, x[None, :], float("-inf"))
        new_best = tl.maximum(best, tl.max(own, 1))
        pivot = tl.where(new_best == float("-inf"), 0.0, new_best)
        total = total * tl.exp(best - pivot) + tl.sum(tl.exp(own - pivot[:, None]), 1)
        best = new_best
    return _log(total) + pivot


@triton.jit
def _load_block(row_ptr, packed_ptr, code, whole, first, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return logits (BLOCK,) float32, -inf outside set 0 and the vocabulary, and which bits differ from the row's."""
    token = first + tl.arange(0, BLOCK)
    inside = token < VOCAB_SIZE
    x = tl.load(row_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)
    differ = tl.load(packed_ptr + token, mask=inside, other=0) ^ code
    return tl.where((differ & whole) == 0, x, float("-inf")), differ


@triton.jit
def _log(total):
    """Return log(total), -inf for 0 without asking the logarithm."""
    return tl.where(total == 0.0, float("-inf"), tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _set_gradient_kernel(
    logits_ptr,
    packed_ptr,
    code_ptr,
    masks_ptr,
    x_0_ptr,
    lse_ptr,
    upstream_ptr,
    target_upstream_ptr,
    out_ptr,
    logits_stride,
    out_stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_SETS: tl.constexpr,
    SUBSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of one row of the gradient; ``out_ptr`` may be ``logits_ptr``."""
    # One dimension of programs: CUDA takes 65,535 in the others, fewer than a row of 2^24 tokens has blocks.
    num_blocks: tl.constexpr = (VOCAB_SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    first = tl.program_id(0) % num_blocks * BLOCK
    code = tl.load(code_ptr + row)
    whole = tl.load(masks_ptr + row * NUM_SETS)
    lse_0 = _finite(tl.load(lse_ptr + row * NUM_SETS))
    weight_0 = tl.load(upstream_ptr + row * NUM_SETS)
    x, differ = _load_block(
        logits_ptr + row * logits_stride, packed_ptr, code, whole, first, VOCAB_SIZE, BLOCK
    )
    terms = tl.exp(x - lse_0)
    gradient = terms * weight_0
    if NUM_SETS > 1:
        k = tl.arange(0, SUBSETS)
        real = k < NUM_SETS - 1
        subset = tl.load(masks_ptr + row * NUM_SETS + 1 + k, mask=real, other=0)
        lse = _finite(tl.load(lse_ptr + row * NUM_SETS + 1 + k, mask=real, other=0.0))
        weight = tl.load(upstream_ptr + row * NUM_SETS + 1 + k, mask=real, other=0.0)
        agrees = (differ[None, :] & subset[:, None]) == 0
        depth = tl.where(real, lse_0 - lse, 0.0)
        if tl.max(depth, 0) > 60.0:
            # exp(lse_0 - lse_k) might overflow where exp(x - lse_0) vanishes: one exp a token and subset.
            own = tl.where(agrees, x[None, :], float("-inf"))
            gradient += tl.sum(weight[:, None] * tl.exp(own - lse[:, None]), 0)
        else:
            factor = weight * tl.exp(depth)
            gradient += terms * tl.sum(tl.where(agrees, factor[:, None], 0.0), 0)
    token = first + tl.arange(0, BLOCK)
    target_weight = tl.load(target_upstream_ptr + row)
    gradient += tl.where(token == tl.load(x_0_ptr + row), target_weight, 0.0)
    tl.store(
        out_ptr + row * out_stride + token, gradient.to(out_ptr.dtype.element_ty), mask=token < VOCAB_SIZE
    )


@triton.jit
def _finite(lse):
    """Return 0 for -inf: an empty set has no gradient, and exp(-inf - 0) is 0."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@on_its_device
def set_lse(logits: Tensor, sets: TokenSets) -> Tensor:
    """Launch `_set_lse_kernel`: arguments and result as of `kernels.token_sets.set_lse`.

    Raises:
        ValueError: for float64 logits, which the kernels do not take.
    """
    logits = _rows_of(logits)
    num_rows, vocab_size = logits.shape
    lse = torch.empty(sets.masks.shape, dtype=torch.float32, device=logits.device)
    if num_rows:
        options, num_warps = _tiling(lse.shape[1], vocab_size)
        _set_lse_kernel[(num_rows,)](
            logits,
            sets.packed,
            sets.code.contiguous(),
            sets.masks.contiguous(),
            lse,
            logits.stride(0),
            **options,
            num_warps=num_warps,
        )
    return lse


@on_its_device
def set_gradient(
    logits: Tensor,
    sets: TokenSets,
    x_0: Tensor,
    lse: Tensor,
    upstream: Tensor,
    target_upstream: Tensor,
    out: Tensor,
) -> Tensor:
    """Launch `_set_gradient_kernel`: arguments and result as of `kernels.token_sets.set_gradient`.

    Raises:
        ValueError: for float64 logits, or an ``out`` whose rows are not contiguous.
    """
    logits = _rows_of(logits)
    if out.stride(1) != 1:
        raise ValueError("the rows of out must be contiguous")
    num_rows, vocab_size = logits.shape
    if num_rows:
        options, num_warps = _tiling(lse.shape[1], vocab_size)
        _set_gradient_kernel[(num_rows * triton.cdiv(vocab_size, options["BLOCK"]),)](
            logits,
            sets.packed,
            sets.code.contiguous(),
            sets.masks.contiguous(),
            x_0.contiguous(),
            lse,
            upstream.contiguous(),
            target_upstream.contiguous(),
            out,
            logits.stride(0),
            out.stride(0),
            **options,
            num_warps=num_warps,
        )
    return out


def _rows_of(logits: Tensor) -> Tensor:
    if wide_dtype(logits) == torch.float64:
        raise ValueError("Triton kernels sum in float32: float64 logits need backend='reference'")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _tiling(num_sets: int, vocab_size: int) -> tuple[dict[str, int], int]:
    """Return the constants of both kernels and their warps: at most 32 sums a thread are in registers."""
    subsets = triton.next_power_of_2(max(1, num_sets - 1))
    block = min(
        triton.next_power_of_2(vocab_size), 2048 if num_sets == 1 else max(128, 4096 // subsets), 2048
    )
    warps = max(1, min(4, subsets * block // 512))
    return {"VOCAB_SIZE": vocab_size, "NUM_SETS": num_sets, "SUBSETS": subsets, "BLOCK": block}, warps


def _case(vocab_size: int, num_sets: int, dtype: str, packed: str = "i16") -> list[CompileCase]:
    """Return both kernels at one size, for logits whose rows are as far apart as they are long."""
    constants, num_warps = _tiling(num_sets, vocab_size)
    size = "i32:16" if vocab_size % 16 == 0 else "i32"
    forward = {
        "logits_ptr": f"*{dtype}:16",
        **dict.fromkeys(("packed_ptr", "code_ptr", "masks_ptr"), f"*{packed}:16"),
        "lse_ptr": "*fp32:16",
        "logits_stride": size,
    }
    backward = forward | {
        "x_0_ptr": "*i64:16",
        **dict.fromkeys(("upstream_ptr", "target_upstream_ptr"), "*fp32:16"),
        "out_ptr": f"*{dtype}:16",
        "out_stride": size,
    }
    name = f"V={vocab_size} K={num_sets} {dtype}"
    return [
        CompileCase(f"set_lse {name}", _set_lse_kernel, forward, constants, num_warps),
        CompileCase(f"set_gradient {name}", _set_gradient_kernel, backward, constants, num_warps),
    ]


# K = 1 is the coded loss, K = S + 1 the bound: text with S = 4 and 1 and the largest published S = 8, images with S = 4
# and S = 2, and the most sets that a codec can ask for.
COMPILE_CASES = [
    case
    for vocab_size, num_sets in [(50257, 1), (50257, 5), (50257, 2), (4096, 5), (256, 1), (256, 3)]
    for dtype in ("fp32", "bf16")
    for case in _case(vocab_size, num_sets, dtype)
] + [*_case(50257, 9, "bf16"), *_case(2**24, 25, "fp32", "i32")]
