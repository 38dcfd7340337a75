"""Kernel of `kernels.modulate.rotate_qk`: all heads of q and k of a token turn in one pass.

Shapes: T packed tokens, H heads, E features of a head, D = H E. One program turns the 2H heads of one token: a tile of
2H x E / 2 first halves and one of second halves, which share the token's E / 2 angles.

It must move 4D values of ``qkv`` and E float32 angles a token: 6.4 KB in bfloat16 at D = 768, E = 64, or 2.2 us for
1,024 tokens at 3 TB/s. Six FLOPs a pair; memory is the floor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_ops.compile_case import CompileCase


@triton.jit
def rotate_qk_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    qkv_stride,
    out_stride,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One token; NUM_HEADS counts those of q and k together."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    feature = tl.arange(0, BLOCK_HALF)
    inside_half = feature < HALF
    cos = tl.load(cos_ptr + token * HALF + feature, inside_half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * HALF + feature, inside_half, other=0.0).to(tl.float32)[None, :]
    place = head * (2 * HALF) + feature[None, :]
    inside = (head < NUM_HEADS) & inside_half[None, :]
    source = qkv_ptr + token * qkv_stride + place
    first = tl.load(source, inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, inside, other=0.0).to(tl.float32)
    target = out_ptr + token * out_stride + place
    dtype = out_ptr.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), inside)
    tl.store(target + HALF, (second * cos + first * sin).to(dtype), inside)


def launch_rotate_qk(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inplace: bool) -> Tensor:
    """Return q and k turned, (T, 2D), a view of ``qkv`` if ``inplace``; arguments as `rotate_qk`."""
    num_tokens, width = qkv.shape
    if qkv.stride(1) != 1:
        raise ValueError(f"qkv must have features side by side, got strides {qkv.stride()}")
    size, half = width // 3 * 2, width // (6 * num_heads)
    out = qkv[:, :size] if inplace else torch.empty(num_tokens, size, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        with torch.cuda.device_of(qkv):
            rotate_qk_kernel[(num_tokens,)](
                qkv,
                cos.contiguous(),
                sin.contiguous(),
                out,
                qkv.stride(0),
                out.stride(0),
                NUM_HEADS=2 * num_heads,
                HALF=half,
                BLOCK_HEADS=triton.next_power_of_2(2 * num_heads),
                BLOCK_HALF=triton.next_power_of_2(half),
                num_warps=4,
            )
    return out


COMPILE_CASES = [
    CompileCase(
        f"rotate_qk D=768 H=12 {dtype}",
        rotate_qk_kernel,
        {
            "qkv_ptr": f"*{dtype}:16",
            "cos_ptr": "*fp32:16",
            "sin_ptr": "*fp32:16",
            "out_ptr": f"*{dtype}:16",
            "qkv_stride": "i32:16",
            "out_stride": "i32:16",
        },
        {"NUM_HEADS": 24, "HALF": 32, "BLOCK_HEADS": 32, "BLOCK_HALF": 32},
    )
    for dtype in ("fp32", "bf16")
]
