"""Sets of tokens given by agreement on digits, and the log-sum-exps of logits over them.

All digits of a token are packed into one integer (`kernels.packed_digits`), so "the tokens whose digits agree with the
row's in some places" is one comparison, (packed ^ code) & mask == 0, whatever the number of digits, and no (S, V, b)
table and no (S, V) planes are read.

Shapes: R rows (one token position each), V tokens, S digits a token, b = base, K sets a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CACHED_LOGITS = 2**19  # so many logits stay in the cache of a CPU core, through about ten passes over them
_LOST = 1e-30  # a sum below this, in units of the row's largest term, has lost digits or vanished
_DEEP = 60.0  # exp of more nats than this, times a term of the larger set, might overflow


class TokenSets(NamedTuple):
    """K sets of tokens for each of R rows; the first set holds all others.

    Attributes:
        packed: (V,) int16, int32 or int64, the digits of every token.
        code: (R,) digits to agree with.
        masks: (R, K) bits of the places where a token must agree; 0 for all tokens.
    """

    packed: Tensor
    code: Tensor
    masks: Tensor

    def rows(self, index: slice | Tensor) -> TokenSets:
        """Return the sets of some rows."""
        return TokenSets(self.packed, self.code[index], self.masks[index])


def set_lse(logits: Tensor, sets: TokenSets) -> Tensor:
    """Return the log-sum-exp of the logits of every set: the reference of the kernels in `triton_ops.nll`.

    Args:
        logits: (R, V) float16, bfloat16, float32 or float64; -inf excludes a token.
        sets: K sets a row.

    Returns:
        (R, K) float32, or float64 for float64 logits; -inf for a set without a finite logit.
    """
    parts = [_set_lse(part, sets.rows(rows)) for rows, part in _cached(logits)]
    return torch.cat(parts) if parts else logits.new_zeros(sets.masks.shape, dtype=wide_dtype(logits))


def set_gradient(
    logits: Tensor,
    sets: TokenSets,
    x_0: Tensor,
    lse: Tensor,
    upstream: Tensor,
    target_upstream: Tensor,
    out: Tensor,
) -> Tensor:
    """Return the gradient of sum_k upstream_k lse_k + target_upstream logits[x_0]: reference of `triton_ops.nll`.

    d lse_k / d logits_x = [x in set k] exp(logits_x - lse_k).

    Args:
        logits: (R, V).
        sets: K sets a row.
        x_0: (R,) int64 tokens.
        lse: (R, K), as `set_lse` gave it.
        upstream: (R, K) in the dtype of ``lse``.
        target_upstream: (R,) in the dtype of ``lse``.
        out: (R, V) in any floating dtype, may be ``logits``.

    Returns:
        ``out``.
    """
    for rows, part in _cached(logits):
        gradient = _set_gradient(part, sets.rows(rows), lse[rows], upstream[rows])
        out[rows] = gradient.scatter_add_(1, x_0[rows, None], target_upstream[rows, None])
    return out


def wide_dtype(logits: Tensor) -> torch.dtype:
    """Return the number type of sums over logits: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _cached(logits: Tensor) -> list[tuple[slice, Tensor]]:
    """Cut (R, V) into chunks of rows that stay in a core's cache; on other devices there is one chunk."""
    num_rows, vocab_size = logits.shape
    step = max(1, CACHED_LOGITS // vocab_size) if logits.device.type == "cpu" else max(1, num_rows)
    chunks = [slice(first, first + step) for first in range(0, num_rows, step)]
    return [(rows, logits[rows]) for rows in chunks]


def _set_lse(logits: Tensor, sets: TokenSets) -> Tensor:
    differ = sets.packed ^ sets.code[:, None]
    scores = _masked(logits, differ & sets.masks[:, :1])
    best = scores.amax(-1, keepdim=True)
    pivot = torch.where(best == -torch.inf, 0, best)
    terms = _exp_(scores.sub_(pivot))
    sums = [terms.sum(-1)]
    sums += [_kept(terms, differ, mask).sum(-1) for mask in sets.masks.T[1:]]
    total = torch.stack(sums, -1)
    lse = total.log() + pivot
    if total.shape[1] > 1:
        # The largest term of these sets is far below the row's: they are summed around their own.
        for row, k in (total < _LOST).nonzero().tolist():
            own = _masked(logits[row], differ[row] & sets.masks[row, k])
            lse[row, k] = torch.logsumexp(own, -1)
    return lse


def _set_gradient(logits: Tensor, sets: TokenSets, lse: Tensor, upstream: Tensor) -> Tensor:
    lse = torch.where(lse == -torch.inf, 0, lse)  # an empty set has no gradient: exp(-inf - 0)
    differ = sets.packed ^ sets.code[:, None]
    # exp(logits - lse_k) = exp(logits - lse_0) exp(lse_0 - lse_k): one exp a token serves all sets.
    depth = lse[:, :1] - lse
    deep = depth > _DEEP
    factors = torch.where(deep, 0, upstream * depth.clamp_max(_DEEP).exp())
    terms = _exp_(_masked(logits, differ & sets.masks[:, :1]).sub_(lse[:, :1]))
    if lse.shape[1] == 1:
        return terms.mul_(factors)
    weights = factors[:, :1].expand(terms.shape).contiguous()
    for mask, factor in zip(sets.masks.T[1:], factors.T[1:], strict=True):
        weights.add_(_kept(factor[:, None], differ, mask))
    gradient = terms.mul_(weights)
    for row, k in deep.nonzero().tolist():
        own = _masked(logits[row], differ[row] & sets.masks[row, k])
        gradient[row] += upstream[row, k] * (own - lse[row, k]).exp()
    return gradient


def _masked(logits: Tensor, differ: Tensor) -> Tensor:
    """Return a wide copy of the logits, -inf where a bit differs."""
    wide = wide_dtype(logits)
    excluded = _any_bit(differ, wide).mul_(torch.finfo(wide).max)
    return torch.addcmul(logits.to(wide), excluded, excluded, value=-1)  # max * max is infinite


def _kept(values: Tensor, differ: Tensor, mask: Tensor) -> Tensor:
    """Return the values where no bit under the mask (R,) differs, else 0."""
    return torch.addcmul(values, values, _any_bit(differ & mask[:, None], values.dtype), value=-1)


def _any_bit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 where a bit is set, else 0, as numbers to calculate with.

    torch compares and selects on a CPU at a fifth of the speed at which it converts and multiplies.
    """
    return bits.to(dtype).abs_().clamp_(max=1)


def _exp_(scores: Tensor) -> Tensor:
    """Exponentiate in place; what is next to the smallest normal number or below becomes 0.

    exp is a hundred times slower where its result is subnormal, and so is arithmetic with it.
    """
    tiny = torch.finfo(scores.dtype).tiny
    floor = math.log(tiny) + 0.3  # exp(0.3) = 1.35
    return F.threshold(scores.clamp_(min=floor).exp_(), 1.5 * tiny, 0.0, inplace=True)
