"""Weights of tokens and their inverse CDF in two levels, as plain torch: what the references of the draws share.

Shapes: R rows, V tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.truncate import truncate

CACHED_SCORES = 2**18
"""So many scores are worked on at a time on a CPU: 1 MB stays in its cache, and needs no fresh pages every time."""

SMALL_VOCAB_SIZE = 1024
"""Up to so many tokens the references work on whole rows: there an operation costs more than what it works on."""


def draw_by_scores(
    scores: Tensor, u: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the column (R,) drawn, and whether there is anything to draw (R,).

    Args:
        scores: (R, N) float32, -inf excludes a column.
        u: (R,) float64 in (0, 1).
        temperature: (R,) float32; 0 takes the first of the largest scores. None: 1 for every row.
        top_k: (R,) int64, 0 = all; None: all of every row.
        top_p: (R,) float32 in (0, 1]; None: 1 for every row.
    """
    best = scores.amax(-1)
    if temperature is not None and not bool(temperature.any()):
        return scores.argmax(-1), best.gt(-torch.inf)
    column = draw_tokens(kept_weights(scores, best, temperature, top_k, top_p), u)
    # Greedy rows are decided by scores: exp gives nearly equal ones the same weight. No truncation removes the best.
    if temperature is not None and not bool(temperature.all()):
        greedy = (temperature == 0).nonzero()[:, 0]
        column[greedy] = scores[greedy].argmax(-1)
    return column, best.gt(-torch.inf)


def kept_weights(
    scores: Tensor,
    best: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> Tensor:
    """Return softmax(scores / temperature) (R, N), 0 outside the top k and the top p; NaN where best is not finite.

    Args:
        scores: (R, N) float32.
        best: (R,) float32, the largest score of each row.
        temperature: (R,) float32; rows at 0 get the weights of temperature 1: they are decided by their best score.
            None: 1 for every row.
        top_k: (R,) int64, 0 = all; None: all of every row.
        top_p: (R,) float32 in (0, 1]; None: 1 for every row.
    """
    divisor = torch.ones_like(best) if temperature is None else torch.where(temperature > 0, temperature, 1.0)
    if temperature is None or bool(divisor.eq(1).all()):
        # Bitwise as below: softmax subtracts the largest score too, which is 0 there.
        weights = scores.softmax(-1)
    else:
        # The largest score becomes 0 before the division, so that no temperature can overflow.
        weights = (scores - best[:, None]).div_(divisor[:, None]).softmax(-1)
    if top_k is not None or top_p is not None:
        truncate(weights, scores, best, divisor, top_k, top_p)
    return weights


def few_at_a_time(rows: Tensor, width: int) -> Iterator[Tensor | slice]:
    """Yield indices of rows in chunks that stay in the cache of a CPU, each as a slice where it is one."""
    num_cached = max(1, CACHED_SCORES // width) if rows.device.type == "cpu" else max(1, len(rows))
    for chunk in rows.split(num_cached) if len(rows) else ():
        first, last = int(chunk[0]), int(chunk[-1])
        yield slice(first, last + 1) if last - first + 1 == len(chunk) else chunk


def draw_tokens(weights: Tensor, u: Tensor) -> Tensor:
    """Return the tokens at given quantiles.

    Args:
        weights: (R, V) float32, not negative, unnormalised.
        u: (R,) float64 in (0, 1).

    Returns:
        (R,) int64.
    """
    vocab_size = weights.shape[-1]
    if vocab_size <= SMALL_VOCAB_SIZE:
        cumulative = weights.double().cumsum(-1)
        return first_above(cumulative, u * cumulative[:, -1])
    block, share = draw_blocks(block_sums(weights), u)
    columns = columns_of(block, vocab_size)
    inside = weights.gather(-1, columns.clamp(max=vocab_size - 1))
    return draw_inside(block, torch.where(columns < vocab_size, inside, 0.0), share)


def block_size(vocab_size: int) -> int:
    """Return the number of tokens of a block: about as many as there are blocks."""
    return min(1 << (vocab_size.bit_length() + 1) // 2, vocab_size)


def block_sums(weights: Tensor) -> Tensor:
    """Return the sum of every block of weights (R, V): (R, blocks) float32, the last of them of fewer tokens."""
    size = block_size(weights.shape[-1])
    whole = weights.shape[-1] - weights.shape[-1] % size
    sums: Tensor = weights[:, :whole].unflatten(-1, (-1, size)).sum(-1)
    if whole < weights.shape[-1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)
    return sums


def draw_blocks(sums: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the block (R,) at the quantile u (R,), and at which share of its sum (R,) float64 the quantile is."""
    mass = F.pad(sums.double(), (1, 0)).cumsum(-1)
    target = u * mass[:, -1]
    block = first_above(mass[:, 1:], target)
    before, after = (mass.gather(-1, index[:, None])[:, 0] for index in (block, block + 1))
    return block, (target - before) / (after - before)


def columns_of(block: Tensor, vocab_size: int) -> Tensor:
    """Return the tokens of blocks (R,), also those beyond V."""
    size = block_size(vocab_size)
    return block[:, None] * size + torch.arange(size, device=block.device)


def draw_inside(block: Tensor, weights: Tensor, share: Tensor) -> Tensor:
    """Return the token (R,) at a share of the mass of its block.

    The sum of a block was rounded to float32. To take a share of it spreads this rounding over all tokens of the
    block, so that every one keeps its probability to the last bits, however rare it is and wherever it stands.

    Args:
        block: (R,) int64.
        weights: (R, tokens of a block) float32, unnormalised.
        share: (R,) float64 in 0..1.
    """
    inside = weights.double().cumsum(-1)
    return block * weights.shape[-1] + first_above(inside, share * inside[:, -1])


def first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first index (R,) where the cumulative sums (R, N) exceed the target (R,).

    Rounding may put the target at the total or an ulp above: then it is the last entry with any mass, never an empty
    one. A row without any mass gets its first entry.
    """
    total = cumulative[:, -1]
    below = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative.contiguous(), below[:, None].contiguous(), right=True)[:, 0]
    return index.where(total > 0, 0)
