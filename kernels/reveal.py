"""Draw tokens from logits and write the digits that are due.

Shapes: R gathered rows (one token position each), V tokens, S digits a token.

Law of one row: softmax(logits / temperature), restricted to the tokens that agree with the visible digits of
the row ("carry-over", MDM-Prime, arXiv 2505.18495, section 3.3), then to the top k, then to the top p,
renormalised. ONE token is drawn, by inverse CDF in two levels: block sums first, then inside one block. One
64-bit uniform number decides, so rare tokens keep their probability. No row's result depends on the other
rows of the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import Backend, choose_backend
from kernels.carry_over import contradicts

BLOCK_SIZE = 256
CACHED_LOGITS = 2**20
NUM_CANDIDATES = 1024


class Revealed(NamedTuple):
    """Result of `reveal_tokens`.

    Attributes:
        y: (R, S) int64, the digits after the draw.
        finite: (R,) bool, False where no token could be drawn; ``y`` is unchanged there.
    """

    y: Tensor
    finite: Tensor


def reveal_tokens(
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    digits: Tensor,
    u: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    *,
    mask_index: int,
    backend: Backend = "auto",
) -> Revealed:
    """Draw one token per row that agrees with its visible digits, and write only the digits that are due.

    Args:
        logits: (R, V) float32, unnormalised log-probabilities; -inf excludes a token.
        y: (R, S) int64, digits in 0..b-1, or ``mask_index`` where masked.
        due: (R, S) bool, the masked digits to write.
        digits: (V, S) int64, the digits of every token.
        u: (R,) float64 in (0, 1).
        temperature: (R,) float32, at least 0; 0 takes the most probable token (the lowest id of equals).
        top_k: (R,) int64, number of tokens to keep, 0 = all; of equally probable tokens the lowest ids are
            kept.
        top_p: (R,) float32 in (0, 1], the smallest set of most probable tokens with at least this mass is
            kept.
        mask_index: b.
        backend: see `choose_backend`.

    Returns:
        The new digits, and which rows are finite. A row whose logits hold NaN or +inf, or that has no
        consistent token with a finite logit, is not finite and keeps its digits.

    Raises:
        ValueError: if the backend is not available.
    """
    if choose_backend(backend, logits) == "triton":
        raise NotImplementedError
    if logits.device.type != "cpu":
        return _reveal(digits, mask_index, logits, y, due, u, temperature, top_k, top_p)
    # A few rows at a time stay in the cache, through about ten passes over them.
    num_cached = max(1, CACHED_LOGITS // logits.shape[1])
    per_row = (logits, y, due, u, temperature, top_k, top_p)
    chunks = zip(*(each.split(num_cached) for each in per_row), strict=True)
    parts = [_reveal(digits, mask_index, *chunk) for chunk in chunks]
    return Revealed(torch.cat([part.y for part in parts]), torch.cat([part.finite for part in parts]))


def _reveal(
    digits: Tensor,
    mask_index: int,
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    u: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
) -> Revealed:
    """Draw for rows that are worked on together: `reveal_tokens` on plain torch.

    Args:
        digits: (V, S) int64.
        mask_index: b.
        logits: (R, V) float32.
        y: (R, S) int64.
        due: (R, S) bool.
        u: (R,) float64.
        temperature: (R,) float32.
        top_k: (R,) int64.
        top_p: (R,) float32.
    """
    scores = torch.where(contradicts(y, digits, mask_index), -torch.inf, logits)
    best = scores.amax(-1)
    finite = logits.amax(-1).lt(torch.inf) & best.gt(-torch.inf)  # amax hands NaN on, and NaN < inf is False
    # Greedy rows are decided here: exp gives nearly equal scores the same weight. No truncation removes the best.
    greedy = (temperature == 0).nonzero()[:, 0]
    most_probable = scores[greedy].argmax(-1)
    weights = truncate(tempered_weights(scores, best, temperature), top_k, top_p)
    token = draw_tokens(weights, u)
    token[greedy] = most_probable
    return Revealed(torch.where(due & finite[:, None], digits[token], y), finite)


def tempered_weights(scores: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Return exp((scores - best) / temperature), in place of the scores.

    Args:
        scores: (R, V) float32.
        best: (R,) float32, the largest score of each row.
        temperature: (R,) float32; rows at 0 get those of temperature 1: they are decided by their best score.
    """
    # The largest score becomes 0 before the division, so that no temperature can overflow.
    scores.sub_(best[:, None]).div_(torch.where(temperature > 0, temperature, 1.0)[:, None])
    # exp is slow where it underflows: below exp(-87), next to the smallest normal number, weights become 0
    # instead.
    return F.threshold(scores.clamp_(min=-87.0).exp_(), 1.7e-38, 0.0, inplace=True)


def truncate(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set the weights outside the top k, then outside the top p, to zero, in place.

    The largest weights of a row usually decide; only where they do not is the whole row sorted.

    Args:
        weights: (R, V) float32, not negative.
        top_k: (R,) int64, 0 = all.
        top_p: (R,) float32 in (0, 1].
    """
    vocab_size = weights.shape[-1]
    limit = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    rows = ((limit < vocab_size) | (top_p < 1)).nonzero()[:, 0]
    for num_sorted in (min(NUM_CANDIDATES, vocab_size), vocab_size):
        if not len(rows):
            break
        candidates = weights[rows]
        largest = candidates.topk(num_sorted).values
        count = _count_kept(candidates, largest, limit[rows], top_p[rows])
        settled = count.le(num_sorted)
        floor = largest.gather(-1, count.clamp(max=num_sorted)[:, None] - 1)
        for row in settled.nonzero()[:, 0]:
            weights[rows[row]] = _keep_largest(candidates[row], floor[row], count[row])
        rows = rows[~settled]
    return weights


def _count_kept(weights: Tensor, largest: Tensor, limit: Tensor, top_p: Tensor) -> Tensor:
    """Return how many tokens (R,) survive top k = ``limit`` and top p; more than N if N do not tell.

    Args:
        weights: (R, V) float32.
        largest: (R, N) float32, their N largest, in descending order.
        limit: (R,) int64 in 1..V.
        top_p: (R,) float32.
    """
    num_sorted, vocab_size = largest.shape[-1], weights.shape[-1]
    mass = largest.double().cumsum(-1)
    within = mass.gather(-1, limit.clamp(max=num_sorted)[:, None] - 1)[:, 0]
    total = torch.where(limit < vocab_size, within, weights.sum(-1, dtype=torch.float64))
    # A token is kept while the mass before it is short of p, so the token that crosses p stays.
    crossing = mass.ge((top_p.double() * total)[:, None])
    count = torch.where(crossing.any(-1), crossing.int().argmax(-1) + 1, num_sorted + 1)
    count = torch.where(top_p < 1, count, limit).minimum(limit)
    undecided = (limit > num_sorted) & (limit < vocab_size)  # their total is not known yet
    if num_sorted == vocab_size:
        return count.clamp(max=vocab_size)  # rounding may leave the sum of all an ulp short of the total
    return torch.where(undecided, num_sorted + 1, count)


def _keep_largest(weights: Tensor, floor: Tensor, count: Tensor) -> Tensor:
    """Keep the ``count`` largest weights (V,), none of which is below ``floor``; of equals the first ones."""
    keep = weights >= floor
    surplus = keep.sum() - count
    if surplus > 0:
        equal = (weights == floor).nonzero()[:, 0]
        keep[equal[len(equal) - surplus :]] = False
    return weights * keep


def draw_tokens(weights: Tensor, u: Tensor) -> Tensor:
    """Return the tokens at given quantiles.

    Args:
        weights: (R, V) float32, not negative, unnormalised.
        u: (R,) float64 in (0, 1).

    Returns:
        (R,) int64.
    """
    num_rows, vocab_size = weights.shape
    blocks = F.pad(weights, (0, -vocab_size % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE))
    mass = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = u * mass[:, -1]
    block = _first_above(mass, target)
    before = F.pad(mass, (1, 0)).gather(-1, block[:, None])[:, 0]
    inside = blocks[torch.arange(num_rows, device=u.device), block].double().cumsum(-1)
    return block * BLOCK_SIZE + _first_above(inside, target - before)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first index (R,) where the cumulative sums (R, N) exceed the target (R,).

    Rounding may put the target an ulp above the total: then it is the last entry with any mass, never an
    empty one.
    """
    index = torch.searchsorted(cumulative, target[:, None].contiguous(), right=True)[:, 0]
    return torch.minimum(index, cumulative.argmax(-1))
