"""Negative log-likelihoods of partly masked tokens: the coded (joint-token) one and the per-digit ones.

Shapes: R rows (one token position each), V tokens, S digits a token, b = base, K sets of tokens a row.

All of them are differences of log-sum-exps over sets of tokens that agree with the row on some digits
(`kernels.token_sets`): with set 0 = "agrees with the visible digits" and set j = "and with digit j of x_0",

    coded  = lse_0 - logits[x_0],        digits = sum over masked j of (lse_0 - lse_j).

One pass over the logits gives all K <= S + 1 sums, one more the gradient; only (R, K) numbers are kept for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import Backend, choose_backend
from kernels.packed_digits import digit_fields, pack_digits
from kernels.token_sets import TokenSets, set_gradient, set_lse, wide_dtype


class SubtokenNLL(NamedTuple):
    """Negative log-likelihoods in nats of R tokens.

    Attributes:
        coded: (R,) float32, -log p(x_0 | y_t): the whole token, given its visible digits.
        digits: (R,) float32, the sum over masked digits j of -log p(y_0^j | y_t); what a likelihood bound needs.
    """

    coded: Tensor
    digits: Tensor


def coded_nll(
    logits: Tensor,
    y_t: Tensor,
    x_0: Tensor,
    digits: Tensor,
    mask_index: int,
    *,
    carry_over: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Return -log p(x_0 | y_t) of R tokens, the integrand of the published training loss (MDM-Prime eq. 7).

    Args:
        logits: (R, V) float32, float64, float16 or bfloat16: unnormalised log-probabilities of whole tokens; -inf
            excludes a token. Sums are in float32 (float64 for float64).
        y_t: (R, S) int64, digits in 0..b-1, or ``mask_index`` where masked.
        x_0: (R,) int64, the tokens.
        digits: (V, S) int64, the digits of every token.
        mask_index: the symbol "masked", b.
        carry_over: whether tokens that contradict visible digits are ruled out first.
        backend: see `choose_backend`.

    Returns:
        (R,) float32 (float64 for float64 logits), nats. Infinite where x_0 is excluded or contradicts y_t. With
        ``carry_over`` zero where nothing is masked. Not finite where a token that is not ruled out has NaN or +inf;
        NaN of a token that is ruled out may make it NaN too.

    Raises:
        ValueError: if the backend is not available.
    """
    state = RowState.of(y_t, x_0, digits, pack_digits(digits, mask_index), mask_index)
    sets = state.visible_set() if carry_over else state.all_tokens()
    lse, target = scores(logits, sets, x_0, backend)
    return state.coded(lse, target, carry_over=carry_over)


def subtoken_nll(
    logits: Tensor, y_t: Tensor, x_0: Tensor, digits: Tensor, mask_index: int, *, backend: Backend = "auto"
) -> SubtokenNLL:
    """Return the coded and the per-digit negative log-likelihoods of R tokens, always with carry-over.

    p(y^j = v | y_t) is the sum of p(x | y_t) over the tokens x with digit_j(x) = v, so each masked digit costs one
    more masked log-sum-exp of the same logits: S + 1 in all.

    Args:
        logits: (R, V) as for `coded_nll`.
        y_t: (R, S) int64, partly masked digits.
        x_0: (R,) int64, the tokens; their digits agree with the visible ones.
        digits: (V, S) int64, the digits of every token.
        mask_index: the symbol "masked".
        backend: see `choose_backend`.

    Returns:
        SubtokenNLL; both zero where nothing is masked.

    Raises:
        ValueError: if the backend is not available.
    """
    state = RowState.of(y_t, x_0, digits, pack_digits(digits, mask_index), mask_index)
    lse, target = scores(logits, state.digit_sets(), x_0, backend)
    return SubtokenNLL(state.coded(lse, target, carry_over=True), state.per_digit(lse))


def revealed_nll(
    logits: Tensor,
    before: Tensor,
    after: Tensor,
    digits: Tensor,
    mask_index: int,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return -log p(the digits revealed between two states | the first), together, of R tokens.

    Args:
        logits: (R, V) as for `coded_nll`.
        before: (R, S) int64, partly masked digits.
        after: (R, S) int64, the same with fewer masked.
        digits: (V, S) int64, the digits of every token.
        mask_index: the symbol "masked".
        backend: see `choose_backend`.

    Returns:
        (R,) float32 (float64 for float64 logits), nats; zero where nothing was revealed.

    Raises:
        ValueError: if the backend is not available.
    """
    fields = digit_fields(digits.shape[1], mask_index, logits.device)
    code = pack_digits(torch.where(after == mask_index, 0, after), mask_index)
    seen = [torch.where(y == mask_index, 0, fields).sum(-1).to(fields.dtype) for y in (before, after)]
    sets = TokenSets(pack_digits(digits, mask_index), code, torch.stack(seen, -1))
    lse, _ = scores(logits, sets, torch.zeros_like(code, dtype=torch.int64), backend)
    return torch.where((before != after).any(-1), lse[:, 0] - lse[:, 1], 0)


class RowState(NamedTuple):
    """What the digits of R tokens say about their sets, before any logits.

    Attributes:
        packed: (V,) see `TokenSets`.
        code: (R,) the visible digits of y_t, and those of x_0 where masked.
        seen: (R,) bits of the visible digits.
        fields: (S,) bits of every digit.
        masked: (R, S) bool.
        agrees: (R,) bool, whether x_0 agrees with the visible digits.
    """

    packed: Tensor
    code: Tensor
    seen: Tensor
    fields: Tensor
    masked: Tensor
    agrees: Tensor

    @classmethod
    def of(cls, y_t: Tensor, x_0: Tensor, digits: Tensor, packed: Tensor, mask_index: int) -> RowState:
        """Read the state of y_t (R, S) with the tokens x_0 (R,); ``packed`` is `pack_digits` of ``digits``."""
        masked = y_t == mask_index
        y_0 = digits[x_0]
        fields = digit_fields(digits.shape[1], mask_index, y_t.device)
        code = pack_digits(torch.where(masked, y_0, y_t), mask_index)
        seen = torch.where(masked, 0, fields).sum(-1).to(fields.dtype)
        return cls(packed, code, seen, fields, masked, (masked | (y_0 == y_t)).all(-1))

    def all_tokens(self) -> TokenSets:
        """Return one set a row: every token."""
        return TokenSets(self.packed, self.code, torch.zeros_like(self.seen)[:, None])

    def visible_set(self) -> TokenSets:
        """Return one set a row: the tokens that agree with the visible digits."""
        return TokenSets(self.packed, self.code, self.seen[:, None])

    def digit_sets(self) -> TokenSets:
        """Return S + 1 sets a row: `visible_set`, and its tokens with digit j of x_0, for every j."""
        with_digit = self.seen[:, None] | self.fields
        return TokenSets(self.packed, self.code, torch.cat([self.seen[:, None], with_digit], 1))

    def coded(self, lse: Tensor, target: Tensor, *, carry_over: bool) -> Tensor:
        """Return the coded negative log-likelihood (R,) from the scores of a set 0 that is right for it."""
        if not carry_over:
            return lse[:, 0] - target
        nll = lse[:, 0] - torch.where(self.agrees, target, -torch.inf)
        return torch.where(self.masked.any(-1), nll, 0)

    def per_digit(self, lse: Tensor) -> Tensor:
        """Return the sum over masked digits (R,) from the scores of `digit_sets`."""
        return torch.where(self.masked, lse[:, :1] - lse[:, 1:], 0).sum(-1)


class Scores(NamedTuple):
    """What negative log-likelihoods are made of.

    Attributes:
        lse: (R, K) the log-sum-exp of every set.
        target: (R,) the logit of x_0.
    """

    lse: Tensor
    target: Tensor


def scores(logits: Tensor, sets: TokenSets, x_0: Tensor, backend: Backend) -> Scores:
    """Return log-sum-exps and the tokens' logits, with a gradient in one pass that keeps no copy of the logits."""
    result = _SetScores.apply(logits, *sets, x_0, backend)  # type: ignore[no-untyped-call]
    return Scores(*cast(tuple[Tensor, Tensor], result))


def forward_scores(logits: Tensor, sets: TokenSets, x_0: Tensor, backend: Backend) -> Scores:
    """Return what `scores` does, outside autograd."""
    if choose_backend(backend, logits) == "triton":
        from kernels.triton_ops.nll import set_lse as triton_set_lse

        lse = triton_set_lse(logits, sets)
    else:
        lse = set_lse(logits, sets)
    return Scores(lse, logits.gather(1, x_0[:, None])[:, 0].to(wide_dtype(logits)))


def backward_scores(
    logits: Tensor,
    sets: TokenSets,
    x_0: Tensor,
    lse: Tensor,
    upstream: Scores,
    out: Tensor,
    backend: Backend,
) -> Tensor:
    """Write d(loss) / d(logits) to ``out`` (R, V), which may be ``logits``, given d(loss) / d(scores)."""
    if choose_backend(backend, logits) == "triton":
        from kernels.triton_ops.nll import set_gradient as triton_set_gradient

        return triton_set_gradient(logits, sets, x_0, lse, *upstream, out)
    return set_gradient(logits, sets, x_0, lse, *upstream, out)


class _SetScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        packed: Tensor,
        code: Tensor,
        masks: Tensor,
        x_0: Tensor,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        lse, target = forward_scores(logits, TokenSets(packed, code, masks), x_0, backend)
        ctx.save_for_backward(logits, packed, code, masks, x_0, lse)
        ctx.backend = backend
        return lse, target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, lse_upstream: Tensor, target_upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, packed, code, masks, x_0, lse = ctx.saved_tensors
        upstream = Scores(lse_upstream, target_upstream)
        # The logits belong to the caller, who may still read them: the gradient has its own memory.
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        sets = TokenSets(packed, code, masks)
        backward_scores(logits, sets, x_0, lse, upstream, gradient, ctx.backend)
        return gradient, None, None, None, None, None
