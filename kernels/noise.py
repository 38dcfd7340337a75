"""Counter-based noise: Philox 4x32-10.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

Every random number of the project is a pure function of (seed, position, index, purpose), so it does not
depend on batch, order, device or backend. Words are 32-bit values held in int64 tensors: a 32 x 32 bit
product wraps around in int64, and its two halves are read back with a shift and a mask.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend

MAX_SEED = 2**64 - 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MAX_FOR_NUMPY = 2**16


class Purpose(IntEnum):
    """What a number is used for: the last counter word, so that uses never share numbers."""

    PLAN = 0
    DRAW = 1
    ROW = 2
    MASK = 3
    LABEL = 4
    SCORE_MASK = 5
    SCORE_COUNT = 6
    SCORE_LABEL = 7


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return the output words of Philox 4x32-10.

    A round takes words (c0, c1, c2, c3) and the key (k0, k1) to
    (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)); then the key moves on by the Weyl
    constants.

    Args:
        counter: (4, ...) int64 of 32-bit words.
        key: (2, ...) int64 of 32-bit words; broadcasts with the counter.

    Returns:
        (4, ...) int64 of 32-bit words, in the broadcast shape.
    """
    c0, c1, c2, c3 = counter.unbind()
    k0, k1 = key.unbind()
    return torch.stack(_rounds(c0, c1, c2, c3, k0, k1))


def seed_words(seed: int) -> tuple[int, int]:
    """Return the low and the high 32-bit word of a seed: the Philox key.

    Raises:
        ValueError: if the seed is not an integer in 0..2**64-1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError("seed must be an integer in 0..2**64-1")
    return seed & _WORD, seed >> 32


def uniform(
    seed: int | Tensor, positions: Tensor, index: Tensor, purpose: Purpose, *, backend: Backend = "auto"
) -> Tensor:
    """Return one uniform number in the open interval (0, 1) per element.

    The counter is (position, index, 0, purpose) and the key is the seed. Every backend gives the same bits.

    Args:
        seed: one seed in 0..2**64-1, or (..., 2) int64: the `seed_words` of every element's own seed.
        positions: (...) int64 in 0..2**32-1.
        index: (...) int64 in 0..2**32-1: a digit or a step. The shapes of seeds (without the last dimension),
            positions and index broadcast; what is broadcast or expanded is not copied.
        purpose: what the number is used for.
        backend: see `choose_backend`.

    Returns:
        (...) float64: (k + 1/2) / 2**52, where k is the high 52 bits of the first two output words.

    Raises:
        ValueError: if the seed is out of range, or the backend is not available.
    """
    words = seed_words(seed) if isinstance(seed, int) else seed
    if choose_backend(backend, positions) == "triton":
        from kernels.triton_ops.noise import launch_uniform

        return launch_uniform(words, positions, index, int(purpose))
    key = words.unbind(-1) if isinstance(words, Tensor) else words
    if not _is_few(positions) or not _is_few(index):
        high, low, _, _ = _rounds(positions, index, 0, int(purpose), *key)
        return unit_interval(high, low)
    arrays = (part.numpy() if isinstance(part, Tensor) else part for part in key)
    high, low, _, _ = _rounds(positions.numpy(), index.numpy(), 0, int(purpose), *arrays)
    return unit_interval(torch.from_numpy(high), torch.from_numpy(low))


def _is_few(words: Tensor) -> bool:
    """Whether numpy is to work on some words: its operations start sooner than torch's, but use one thread."""
    # Of a single number numpy makes a scalar, which warns where a product wraps around.
    return words.is_cpu and words.ndim > 0 and words.numel() <= _MAX_FOR_NUMPY


def unit_interval(high: Tensor, low: Tensor) -> Tensor:
    """Map 64 random bits to (0, 1): (k + 1/2) / 2**52 with k the high 52 bits.

    52 bits and not 53: k + 1/2 must be exact in float64, or the largest k would round up to 1.

    Args:
        high: (...) int64, the high 32-bit word.
        low: (...) int64, the low 32-bit word.

    Returns:
        (...) float64.
    """
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def row_seed(seed: int, row: int) -> int:
    """Return the seed of one of the outputs of a request.

    Output 0 has the request's own seed, so asking for one output with the reported seed reproduces that
    output.

    Args:
        seed: the request's seed in 0..2**64-1.
        row: number of the output in 0..2**32-1.

    Raises:
        ValueError: if an argument is out of range.
    """
    key = seed_words(seed)
    if not 0 <= row <= _WORD:
        raise ValueError(f"row must be in 0..2**32-1, got {row}")
    if row == 0:
        return seed
    # On Python integers: for one number a hundred small tensor operations cost too much.
    high, low, _, _ = _rounds(row, 0, 0, int(Purpose.ROW), *key)
    return int(high << 32 | low)


def _rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """`philox` of words that are Python integers, or int64 tensors or arrays, which broadcast.

    Words c1 and c3 keep the high halves of their products and the key's words their carries until the end: they are
    only XORed into words that are masked then.
    """
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (second >> 32 ^ c1 ^ k0) & _WORD, (first >> 32 ^ c3 ^ k1) & _WORD
        c1, c3 = second, first
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1 & _WORD, c2, c3 & _WORD
