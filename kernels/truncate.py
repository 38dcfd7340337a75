"""Top-k and top-p: which tokens of a row are kept.

Shapes: R rows, V tokens, N largest scores of a row.

The tokens are ranked by score, of equals the lowest id first. Top-k keeps the first k. Top-p keeps a token while the
mass before it is short of p, as a share of the mass of the top k, so the token that crosses p stays.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUM_CANDIDATES = (64, 2048)
"""So many of the largest scores are ranked first; they usually decide."""

_BLOCK_SIZE = 16


def truncate(
    weights: Tensor, scores: Tensor, best: Tensor, divisor: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> None:
    """Set the weights outside the top k, then outside the top p, to zero, in place.

    Args:
        weights: (R, V) float32, softmax(scores / divisor).
        scores: (R, V) float32.
        best: (R,) float32, the largest score of each row.
        divisor: (R,) float32, the temperature, above 0.
        top_k: (R,) int64, 0 = all; None: all of every row.
        top_p: (R,) float32 in (0, 1]; None: 1 for every row.
    """
    num_rows, vocab_size = scores.shape
    top_k = torch.zeros(num_rows, dtype=torch.int64, device=scores.device) if top_k is None else top_k
    top_p = torch.ones(num_rows, device=scores.device) if top_p is None else top_p
    limit = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    rows = ((limit < vocab_size) | (top_p < 1)).nonzero()[:, 0]
    for num_ranked in (*(n for n in NUM_CANDIDATES if 2 * n < vocab_size), vocab_size):
        if not len(rows):
            break
        if bool(((limit[rows] > num_ranked) & (limit[rows] < vocab_size)).all()):
            continue  # so few cannot tell
        some = scores if len(rows) == num_rows else scores[rows]
        ranked = _largest(some, num_ranked)
        # As softmax has them, but for the last bit: relative to the largest score, which has the largest weight.
        mass = (ranked - best[rows, None]).div_(divisor[rows, None]).exp_()
        mass *= weights.amax(-1)[rows, None]
        total = weights.sum(-1, dtype=torch.float64)[rows]
        count = _count_kept(mass, total, limit[rows], top_p[rows], vocab_size)
        settled = count.le(num_ranked)
        if len(rows) == num_rows and bool(settled.all()):  # without copies
            torch.where(_is_kept(scores, ranked, count), weights, weights.new_zeros(()), out=weights)
            break
        weights[rows[settled]] *= _is_kept(some[settled], ranked[settled], count[settled])
        rows = rows[~settled]


def _largest(scores: Tensor, num_ranked: int) -> Tensor:
    """Return the N largest scores (R, N), in descending order."""
    vocab_size = scores.shape[-1]
    if scores.device.type != "cpu":
        return scores.topk(num_ranked).values
    if num_ranked * _BLOCK_SIZE * 4 < vocab_size:
        # They are in the N blocks with the largest maxima, so most of a long row is looked at only once. A block is
        # every M-th token, which makes the maxima fast.
        whole = vocab_size - vocab_size % _BLOCK_SIZE
        blocks = scores[:, :whole].unflatten(-1, (_BLOCK_SIZE, -1))
        chosen = blocks.amax(1).topk(num_ranked, sorted=False).indices
        inside = blocks.gather(-1, chosen[:, None].expand(-1, _BLOCK_SIZE, -1)).flatten(1)
        return torch.cat([inside, scores[:, whole:]], -1).topk(num_ranked).values
    # numpy's sort and partition of float32 are an order of magnitude faster than those of torch on a CPU.
    values = scores.detach().numpy()
    if num_ranked < vocab_size:
        values = np.partition(values, vocab_size - num_ranked)[:, vocab_size - num_ranked :]
    return torch.from_numpy(np.sort(values)).flip(-1)


def _count_kept(mass: Tensor, total: Tensor, limit: Tensor, top_p: Tensor, vocab_size: int) -> Tensor:
    """Return how many tokens (R,) survive top k = ``limit`` and top p; more than N if N do not tell.

    Args:
        mass: (R, N) float32, the N largest weights, in descending order.
        total: (R,) float64, the sum of all weights.
        limit: (R,) int64 in 1..V.
        top_p: (R,) float32.
        vocab_size: V.
    """
    num_ranked = mass.shape[-1]
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    within = cumulative.gather(-1, limit.clamp(max=num_ranked)[:, None] - 1)[:, 0]
    total = torch.where(limit < vocab_size, within, total)
    # A token is kept while the mass before it is short of p, so the token that crosses p stays.
    crossing = torch.searchsorted(cumulative, (top_p.double() * total)[:, None])[:, 0] + 1
    count = torch.where(top_p < 1, crossing, limit).minimum(limit)
    if num_ranked == vocab_size:
        return count  # at most V, though rounding may leave the sum of all an ulp short of the total
    undecided = (limit > num_ranked) & (limit < vocab_size)  # their total is not known yet
    return torch.where(undecided, num_ranked + 1, count)


def _is_kept(scores: Tensor, ranked: Tensor, count: Tensor) -> Tensor:
    """Return which tokens (R, V) are the ``count`` first, of equals the first ids.

    Args:
        scores: (R, V) float32.
        ranked: (R, N) float32, the largest scores, in descending order.
        count: (R,) int64 in 1..N.
    """
    num_ranked = ranked.shape[-1]
    floor = ranked.gather(-1, count[:, None] - 1)
    keep = scores >= floor
    # The first score that is not kept tells whether others are equal to the last that is; beyond N it is not known.
    after = ranked.gather(-1, count[:, None].clamp(max=num_ranked - 1))
    crowded = (after == floor)[:, 0].nonzero()[:, 0]
    if len(crowded):
        equal = scores[crowded] == floor[crowded]
        room = count[crowded] - (scores[crowded] > floor[crowded]).sum(-1)
        keep[crowded] &= ~equal | (equal.cumsum(-1, dtype=torch.int32) <= room[:, None])
    return keep
