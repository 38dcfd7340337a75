"""Philox 4x32-10 in a Triton kernel: the same bits as `kernels.noise`.

Shapes: N elements of the broadcast shape, seen as N = O x I (outer x inner dimension) with a stride of each operand.

Bytes: an element writes 8 and reads at most 32 (two key words, position, index, all int64), less where operands are
expanded. Work: 10 rounds of two 32 x 32 -> 64 bit products and four XORs, about 100 integer operations: with 3.35 TB/s
and 132 x 64 integer lanes at 1.7 GHz (H100), 12 ps of memory against 7 ps of arithmetic an element. So a call of fewer
than some 100,000 elements costs its launch; what matters is that other kernels call `philox_uniform` in registers,
and then no uniform number is read or written at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_ops.compile_case import CompileCase
from kernels.triton_ops.launch import on_its_device

BLOCK = 256


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Return the four output words (uint32) of a counter and a key of integers; their low 32 bits count."""
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    first_multiplier = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    second_multiplier = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high_first, low_first = tl.umulhi(first_multiplier, c0), first_multiplier * c0
        high_second, low_second = tl.umulhi(second_multiplier, c2), second_multiplier * c2
        c0, c1 = high_second ^ c1 ^ k0, low_second
        c2, c3 = high_first ^ c3 ^ k1, low_first
        k0 += tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def philox_uniform(c0, c1, c2, c3, k0, k1):
    """Return (k + 1/2) / 2**52 as float64, k the high 52 bits of the first two output words.

    For a number of `kernels.noise.uniform`: counter (position, index, 0, purpose), key (low, high word of the seed).
    All are tensors of integers of one shape.
    """
    high, low, _, _ = philox_words(c0, c1, c2, c3, k0, k1)
    bits = (high.to(tl.uint64) << 20) | (low >> 12).to(tl.uint64)
    # Exact: k and k + 1/2 fit in 53 bits, and the product only moves the exponent.
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit(do_not_specialize=["low_key", "high_key"])
def uniform_kernel(
    out_ptr,
    seeds_ptr,
    positions_ptr,
    index_ptr,
    low_key,
    high_key,
    num_elements,
    num_inner,
    seeds_outer,
    seeds_inner,
    positions_outer,
    positions_inner,
    index_outer,
    index_inner,
    word_stride,
    PURPOSE: tl.constexpr,
    ONE_SEED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK numbers of the contiguous output (O, I)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < num_elements
    outer, inner = element // num_inner, element % num_inner
    position = tl.load(positions_ptr + outer * positions_outer + inner * positions_inner, inside, other=0)
    index = tl.load(index_ptr + outer * index_outer + inner * index_inner, inside, other=0)
    zero = tl.zeros([BLOCK], tl.uint32)
    if ONE_SEED:
        k0, k1 = zero + low_key.to(tl.uint32), zero + high_key.to(tl.uint32)
    else:
        key_ptr = seeds_ptr + outer * seeds_outer + inner * seeds_inner
        k0, k1 = tl.load(key_ptr, inside, other=0), tl.load(key_ptr + word_stride, inside, other=0)
    tl.store(out_ptr + element, philox_uniform(position, index, zero, zero + PURPOSE, k0, k1), inside)


@on_its_device
def launch_uniform(
    seed: tuple[int, int] | Tensor, positions: Tensor, index: Tensor, purpose: int, *, block: int = BLOCK
) -> Tensor:
    """Return `kernels.noise.uniform` of one seed's words, or of seeds (..., 2) int64.

    Operands are read with the strides that they have as long as the broadcast shape folds into two dimensions, and
    are copied to its full size otherwise.
    """
    if isinstance(seed, Tensor):
        keys, words, word_stride = seed[..., 0], (0, 0), seed.stride(-1)
    else:
        keys, words, word_stride = positions, seed, 0  # the kernel does not read them
    shape = torch.broadcast_shapes(keys.shape, positions.shape, index.shape)
    out = torch.empty(shape, dtype=torch.float64, device=positions.device)
    if out.numel() == 0:
        return out
    keys, expanded, numbers = (operand.expand(shape) for operand in (keys, positions, index))
    folded = _two_dimensions(shape, [operand.stride() for operand in (keys, expanded, numbers)])
    if folded is None:
        copied = seed.expand(*shape, 2).contiguous() if isinstance(seed, Tensor) else seed
        return launch_uniform(copied, expanded.contiguous(), numbers.contiguous(), purpose, block=block)
    num_inner, strides = folded
    # As signed numbers of 32 bits, so that every seed meets the same compiled kernel.
    low_key, high_key = (word - (word >> 31 << 32) for word in words)
    uniform_kernel[(triton.cdiv(out.numel(), block),)](
        out,
        keys,
        expanded,
        numbers,
        low_key,
        high_key,
        out.numel(),
        num_inner,
        *strides,
        word_stride,
        PURPOSE=purpose,
        ONE_SEED=not isinstance(seed, Tensor),
        BLOCK=block,
    )
    return out


def _two_dimensions(shape: torch.Size, strides: list[tuple[int, ...]]) -> tuple[int, tuple[int, ...]] | None:
    """Merge neighbouring dimensions that every operand strides through evenly.

    Returns:
        Size of the inner dimension, and the outer and the inner stride of each operand in turn; None if more than two
        dimensions are left.
    """
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []
    for size, *step in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if steps and all(before == after * size for before, after in zip(steps[-1], step, strict=True)):
            sizes[-1], steps[-1] = sizes[-1] * size, tuple(step)
        else:
            sizes.append(size)
            steps.append(tuple(step))
    if len(sizes) > 2:
        return None
    nothing = (0,) * len(strides)
    outer, inner = [nothing] * (2 - len(sizes)) + steps
    num_inner = sizes[-1] if sizes else 1
    return num_inner, tuple(stride for pair in zip(outer, inner, strict=True) for stride in pair)


_POINTERS = {
    "out_ptr": "*fp64:16",
    "seeds_ptr": "*i64:16",
    "positions_ptr": "*i64:16",
    "index_ptr": "*i64:16",
}
_INTEGERS = [
    name
    for name in uniform_kernel.arg_names
    if name.endswith(("_key", "_outer", "_inner", "_stride", "_elements"))
]
_TYPES = _POINTERS | dict.fromkeys(_INTEGERS, "i32")

COMPILE_CASES = [
    CompileCase(
        f"uniform, {'one seed' if one_seed else 'a seed each'}",
        uniform_kernel,
        _TYPES,
        {"PURPOSE": 1, "ONE_SEED": one_seed, "BLOCK": BLOCK},
    )
    for one_seed in (False, True)
]
