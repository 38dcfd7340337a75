"""A kernel around the device function `philox_words`, for tests that need a whole counter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_ops.noise import philox_words


@triton.jit
def words_kernel(out_ptr, counters_ptr, keys_ptr, N: tl.constexpr):
    """Write the output words (4, N) of counters (4, N) and keys (2, N)."""
    column = tl.arange(0, N)
    w0, w1, w2, w3 = philox_words(
        tl.load(counters_ptr + column),
        tl.load(counters_ptr + N + column),
        tl.load(counters_ptr + 2 * N + column),
        tl.load(counters_ptr + 3 * N + column),
        tl.load(keys_ptr + column),
        tl.load(keys_ptr + N + column),
    )
    tl.store(out_ptr + column, w0.to(tl.int64))
    tl.store(out_ptr + N + column, w1.to(tl.int64))
    tl.store(out_ptr + 2 * N + column, w2.to(tl.int64))
    tl.store(out_ptr + 3 * N + column, w3.to(tl.int64))


def kernel_words(counter: Tensor, key: Tensor) -> Tensor:
    """`kernels.noise.philox` of counters (4, N) and keys (2, N), N a power of two, in the kernel."""
    out = counter.new_zeros(counter.shape)
    words_kernel[(1,)](out, counter.contiguous(), key.contiguous(), N=counter.shape[1])
    return out
