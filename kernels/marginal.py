"""Draw every digit of a token alone, from its own marginal law.

Shapes: R gathered rows (one token position each), V tokens, S digits a token.

Law of digit j of one row: P(digit = v) is the mass of all tokens whose digit j is v, under softmax(logits /
temperature) restricted to the top k, then to the top p. The digits of a token are independent, and the digits that
are visible already do NOT restrict the tokens: this is what the published image sampler of MDM-Prime (arXiv
2505.18495) does, and it differs from `kernels.reveal`. It needs a codec whose every code is a token.

The marginal of a digit is a sum over equally many tokens for each of its b values: a reshape and a sum where the codec
has no permutation. Its inverse CDF is over b numbers in float64, so tails are as exact as in `kernels.reveal`. No row's
result depends on the other rows of the call.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend
from kernels.draw import few_at_a_time, first_above, kept_weights
from kernels.reveal import Revealed, write_changed
from kernels.token_digits import TokenDigits


def reveal_digits(
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    digits: Tensor | TokenDigits,
    u: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    *,
    mask_index: int,
    backend: Backend = "auto",
) -> Revealed:
    """Draw every digit that is due from its own marginal law, independently.

    Args:
        logits: (R, V) float32, bfloat16 or float16, unnormalised log-probabilities; -inf excludes a token.
        y: (R, S) integers, digits in 0..b-1, or ``mask_index`` where masked.
        due: (R, S) bool, the masked digits to write. A row where nothing is due costs next to nothing.
        digits: the digits of every token, (V, S) int64, V = b^S; a caller that draws more than once keeps
            `TokenDigits`.
        u: (R, S) float64 in (0, 1), one number per digit; those of digits that are not due are not used.
        temperature: (R,) float32, at least 0; 0 takes the digits of the most probable token (the lowest id of equals).
            None: 1 for every row.
        top_k: (R,) int64, number of tokens to keep, 0 = all. None: all of every row, which saves the search.
        top_p: (R,) float32 in (0, 1], the smallest set of most probable tokens with at least this mass is kept. None:
            1 for every row.
        mask_index: b.
        backend: see `choose_backend`; "auto" takes the reference for more than 4,096 tokens.

    Returns:
        The new digits, which rows are finite, and which changed. A row with something due whose logits hold NaN or
        +inf, or no finite one, is not finite and keeps its digits.

    Raises:
        ValueError: if the backend is not available, or some combinations of digits stand for no token.
    """
    tokens = _checked(digits, mask_index)
    if _choose_backend(backend, logits) == "triton":
        from kernels.triton_ops.marginal import launch_marginal

        y = y.clone()
        return Revealed(y, *launch_marginal(logits, y, None, due, tokens, u, temperature, top_k, top_p))
    return _reveal_rows(tokens, logits, y, due, u, temperature, top_k, top_p)


def reveal_digits_(
    logits: Tensor,
    state: Tensor,
    positions: Tensor,
    due: Tensor,
    digits: Tensor | TokenDigits,
    u: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    *,
    mask_index: int,
    backend: Backend = "auto",
) -> Revealed:
    """Write the digits that are due straight into a packed state: `reveal_digits` in place.

    Args:
        logits: (R, V) as in `reveal_digits`.
        state: (T, S) integers, the digits of all tokens; written.
        positions: (R,) int64 in 0..T-1, which token of the state a row is. Positions of rows where something is due
            are distinct; rows where nothing is due may repeat any.
        due: (R, S) as in `reveal_digits`, like all that follow.
        digits: the digits of every token.
        u: (R, S) float64.
        temperature: (R,) float32 or None.
        top_k: (R,) int64 or None.
        top_p: (R,) float32 or None.
        mask_index: b.
        backend: see `choose_backend`; "auto" takes the reference for more than 4,096 tokens.

    Returns:
        The state, which rows are finite, and which changed.

    Raises:
        ValueError: if the backend is not available, or some combinations of digits stand for no token.
    """
    tokens = _checked(digits, mask_index)
    if _choose_backend(backend, logits) == "triton":
        from kernels.triton_ops.marginal import launch_marginal

        return Revealed(
            state, *launch_marginal(logits, state, positions, due, tokens, u, temperature, top_k, top_p)
        )
    revealed = _reveal_rows(tokens, logits, state[positions], due, u, temperature, top_k, top_p)
    write_changed(state, positions, revealed)
    return revealed._replace(y=state)


MAX_KERNEL_VOCAB_SIZE = 4096
"""The kernel keeps a row in registers."""


def _choose_backend(backend: Backend, logits: Tensor) -> Literal["reference", "triton"]:
    """Return the implementation that runs: for long rows "auto" takes the reference."""
    vocab_size = logits.shape[-1]
    if vocab_size > MAX_KERNEL_VOCAB_SIZE and backend == "auto":
        return "reference"
    chosen = choose_backend(backend, logits)
    if vocab_size > MAX_KERNEL_VOCAB_SIZE and chosen == "triton":
        raise ValueError(
            f"the kernel of digits drawn alone takes at most {MAX_KERNEL_VOCAB_SIZE} tokens, got {vocab_size}; "
            "use 'auto'"
        )
    return chosen


def _checked(digits: Tensor | TokenDigits, mask_index: int) -> TokenDigits:
    """Return the digits if every combination of them stands for a token."""
    tokens = TokenDigits.of(digits, mask_index)
    if mask_index**tokens.num_digits != tokens.vocab_size:
        raise ValueError(
            f"digits cannot be drawn alone: {mask_index}**{tokens.num_digits} codes, "
            f"but {tokens.vocab_size} tokens"
        )
    return tokens


def _reveal_rows(
    tokens: TokenDigits,
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    u: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> Revealed:
    """Draw for all rows: `reveal_digits` on plain torch."""
    needed = due.any(-1)
    finite = torch.ones_like(needed)
    written = torch.zeros(y.shape, dtype=torch.int64, device=y.device)
    for rows in few_at_a_time(needed.nonzero()[:, 0], logits.shape[1]):
        scores = logits[rows].float()
        best = scores.amax(-1)
        finite[rows] = best.lt(torch.inf) & best.gt(-torch.inf)  # amax hands NaN on, and NaN < inf is False
        heat, k, p = (part if part is None else part[rows] for part in (temperature, top_k, top_p))
        drawn = _quantiles(tokens, kept_weights(scores, best, heat, k, p), u[rows], due[rows])
        if heat is not None and not bool(heat.all()):
            greedy = (heat == 0).nonzero()[:, 0]
            drawn[greedy] = tokens.table[scores[greedy].argmax(-1)]
        written[rows] = drawn
    return Revealed(torch.where(due & finite[:, None], written.to(y.dtype), y), finite, finite & needed)


def _quantiles(tokens: TokenDigits, weights: Tensor, u: Tensor, due: Tensor) -> Tensor:
    """Return the digits (R, S) at the quantiles u (R, S) of their marginal laws, 0 where no row has them due.

    Args:
        tokens: the digits of every token.
        weights: (R, V) float32, not negative, unnormalised.
        u: (R, S) float64.
        due: (R, S) bool.
    """
    result = torch.zeros(u.shape, dtype=torch.int64, device=u.device)
    base, num_digits = tokens.mask_index, tokens.num_digits
    for digit in due.any(0).nonzero()[:, 0].tolist():
        if tokens.in_order:
            mass = weights.unflatten(-1, (base**digit, base, base ** (num_digits - 1 - digit))).sum((1, 3))
        else:  # b values, each of as many tokens
            mass = weights[:, tokens.by_digit[digit]].unflatten(-1, (base, -1)).sum(-1)
        cumulative = mass.double().cumsum(-1)
        result[:, digit] = first_above(cumulative, u[:, digit] * cumulative[:, -1])
    return result
