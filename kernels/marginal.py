"""Draw every digit of a token alone, from its own marginal law.

Shapes: R gathered rows (one token position each), V tokens, S digits a token.

Law of digit j of one row: P(digit = v) is the mass of all tokens whose digit j is v, under softmax(logits /
temperature) restricted to the top k, then to the top p. The digits of a token are independent, and the digits that
are visible already do NOT restrict the tokens: this is what the published image sampler of MDM-Prime (arXiv
2505.18495) does, and it differs from `kernels.reveal`. It needs a codec whose every code is a token.

Written as a draw of a token per digit: with the tokens in the order of their digit j, equal digits side by side, the
inverse CDF over tokens picks the digit that the inverse CDF over digits picks. So there is no table of marginals, and
tails are as exact as in `kernels.reveal`. No row's result depends on the other rows of the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend
from kernels.reveal import CACHED_LOGITS, Revealed, draw_tokens, tempered_weights, truncate


def reveal_digits(
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
    """Draw every digit that is due from its own marginal law, independently.

    Args:
        logits: (R, V) float32, unnormalised log-probabilities; -inf excludes a token.
        y: (R, S) int64, digits in 0..b-1, or ``mask_index`` where masked.
        due: (R, S) bool, the masked digits to write.
        digits: (V, S) int64, the digits of every token; V = b^S.
        u: (R, S) float64 in (0, 1), one number per digit; those of digits that are not due are not used.
        temperature: (R,) float32, at least 0; 0 takes the digits of the most probable token (the lowest id of equals).
        top_k: (R,) int64, number of tokens to keep, 0 = all.
        top_p: (R,) float32 in (0, 1], the smallest set of most probable tokens with at least this mass is kept.
        mask_index: b.
        backend: see `choose_backend`.

    Returns:
        The new digits, and which rows are finite. A row whose logits hold NaN or +inf, or no finite one, is not
        finite and keeps its digits.

    Raises:
        ValueError: if the backend is not available, or some combinations of digits stand for no token.
    """
    if choose_backend(backend, logits) == "triton":
        raise NotImplementedError
    vocab_size, num_digits = digits.shape
    if mask_index**num_digits != vocab_size:
        raise ValueError(
            f"digits cannot be drawn alone: {mask_index}**{num_digits} codes, but {vocab_size} tokens"
        )
    num_cached = len(logits) if logits.device.type != "cpu" else CACHED_LOGITS // vocab_size
    chunks = zip(
        *(part.split(max(1, num_cached)) for part in (logits, y, due, u, temperature, top_k, top_p)),
        strict=True,
    )
    parts = [_reveal(digits, *chunk) for chunk in chunks]
    return Revealed(torch.cat([part.y for part in parts]), torch.cat([part.finite for part in parts]))


def _reveal(
    digits: Tensor,
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    u: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
) -> Revealed:
    """Draw for rows that are worked on together: `reveal_digits` on plain torch."""
    best, most_probable = logits.max(-1)
    finite = best.lt(torch.inf) & best.gt(-torch.inf)  # max hands NaN on, and NaN < inf is False
    weights = truncate(tempered_weights(logits.clone(), best, temperature), top_k, top_p)
    written = digits[most_probable]
    for digit, column in enumerate(digits.T):
        rows = (due[:, digit] & finite & (temperature > 0)).nonzero()[:, 0]
        order = column.argsort(stable=True)
        written[rows, digit] = column[order[draw_tokens(weights[rows][:, order], u[rows, digit])]]
    return Revealed(torch.where(due & finite[:, None], written, y), finite)
