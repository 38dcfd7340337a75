"""Negative log-likelihoods of partly masked tokens: the coded (joint-token) one and the per-digit ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.carry_over import contradicts


class SubtokenNLL(NamedTuple):
    """Negative log-likelihoods in nats of R tokens.

    Attributes:
        coded: (R,) float32, -log p(x_0 | y_t): the whole token, given its visible digits.
        digits: (R,) float32, the sum over masked digits j of -log p(y_0^j | y_t); what a likelihood bound needs.
    """

    coded: Tensor
    digits: Tensor


def coded_nll(
    logits: Tensor, y_t: Tensor, x_0: Tensor, digits: Tensor, mask_index: int, *, carry_over: bool = True
) -> Tensor:
    """Return -log p(x_0 | y_t) of R tokens, the integrand of the published training loss.

    Args:
        logits: (R, V) float32.
        y_t: (R, S) partly masked digits.
        x_0: (R,) the tokens.
        digits: (V, S) the digits of every token.
        mask_index: the symbol "masked".
        carry_over: whether tokens that contradict visible digits are ruled out first.

    Returns:
        (R,) float32, nats.
    """
    if carry_over:
        logits = logits.masked_fill(contradicts(y_t, digits, mask_index), -torch.inf)
    return F.cross_entropy(logits, x_0, reduction="none")


def subtoken_nll(logits: Tensor, y_t: Tensor, x_0: Tensor, digits: Tensor, mask_index: int) -> SubtokenNLL:
    """Return the coded and the per-digit negative log-likelihoods of R tokens, always with carry-over.

    p(y^j = v | y_t) is the sum of p(x | y_t) over the tokens x with digit_j(x) = v, so each masked digit costs one
    more masked log-sum-exp of the same logits: S + 1 in all.

    Args:
        logits: (R, V) float32: unnormalised log-probabilities of whole tokens.
        y_t: (R, S) partly masked digits.
        x_0: (R,) the tokens; their digits agree with the visible ones.
        digits: (V, S) the digits of every token.
        mask_index: the symbol "masked".

    Returns:
        SubtokenNLL; both zero where nothing is masked.
    """
    logits = logits.masked_fill(contradicts(y_t, digits, mask_index), -torch.inf)
    total = torch.logsumexp(logits, -1)
    y_0 = digits[x_0]
    per_digit = torch.zeros_like(total)
    for j in range(digits.shape[1]):
        masked = y_t[:, j] == mask_index
        same_digit = y_0[:, j, None] == digits[:, j]
        marginal = torch.logsumexp(logits.masked_fill(~same_digit, -torch.inf), -1)
        per_digit = per_digit + torch.where(masked, total - marginal, torch.zeros_like(total))
    coded = total - logits.gather(-1, x_0[:, None]).squeeze(-1)
    return SubtokenNLL(coded, per_digit)
