"""Draw tokens from logits and write the digits that are due.

Shapes: R gathered rows (one token position each), V tokens, S digits a token, T tokens of a packed state.

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

from kernels.backend import Backend, choose_backend
from kernels.draw import draw_by_scores, few_at_a_time
from kernels.token_digits import TokenDigits


class Revealed(NamedTuple):
    """Result of `reveal_tokens`.

    Attributes:
        y: (R, S) the digits after the draw, in the dtype they came in; of `reveal_tokens_`, the state (T, S).
        finite: (R,) bool, False where something is due and no token could be drawn; ``y`` is unchanged there.
        changed: (R,) bool, whether any digit was written.
    """

    y: Tensor
    finite: Tensor
    changed: Tensor


def reveal_tokens(
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    digits: Tensor | TokenDigits,
    u: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    *,
    mask_index: int,
    backend: Backend = "auto",
) -> Revealed:
    """Draw one token per row that agrees with its visible digits, and write only the digits that are due.

    Args:
        logits: (R, V) float32, bfloat16 or float16, unnormalised log-probabilities; -inf excludes a token.
        y: (R, S) integers, digits in 0..b-1, or ``mask_index`` where masked.
        due: (R, S) bool, the masked digits to write. A row where nothing is due costs next to nothing.
        digits: the digits of every token, (V, S) int64; a caller that draws more than once keeps `TokenDigits`.
        u: (R,) float64 in (0, 1).
        temperature: (R,) float32, at least 0; 0 takes the most probable token (the lowest id of equals).
        top_k: (R,) int64, number of tokens to keep, 0 = all; of equally probable tokens the lowest ids are
            kept. None: all of every row, which saves the search.
        top_p: (R,) float32 in (0, 1], the smallest set of most probable tokens with at least this mass is
            kept. None: 1 for every row.
        mask_index: b.
        backend: see `choose_backend`.

    Returns:
        The new digits, which rows are finite, and which changed. A row with something due whose logits hold NaN or
        +inf, or that has no consistent token with a finite logit, is not finite and keeps its digits.

    Raises:
        ValueError: if the backend is not available.
    """
    tokens = TokenDigits.of(digits, mask_index)
    if choose_backend(backend, logits) == "triton":
        from kernels.triton_ops.reveal import launch_reveal

        y = y.clone()
        return Revealed(y, *launch_reveal(logits, y, None, due, tokens, u, temperature, top_k, top_p))
    return _reveal_rows(tokens, logits, y, due, u, temperature, top_k, top_p)


def reveal_tokens_(
    logits: Tensor,
    state: Tensor,
    positions: Tensor,
    due: Tensor,
    digits: Tensor | TokenDigits,
    u: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    *,
    mask_index: int,
    backend: Backend = "auto",
) -> Revealed:
    """Write the digits that are due straight into a packed state: `reveal_tokens` in place.

    Args:
        logits: (R, V) as in `reveal_tokens`.
        state: (T, S) integers, the digits of all tokens; written.
        positions: (R,) int64 in 0..T-1, which token of the state a row is. Positions of rows where something is due
            are distinct; rows where nothing is due may repeat any.
        due: (R, S) as in `reveal_tokens`, like all that follow.
        digits: the digits of every token.
        u: (R,) float64.
        temperature: (R,) float32.
        top_k: (R,) int64 or None.
        top_p: (R,) float32 or None.
        mask_index: b.
        backend: see `choose_backend`.

    Returns:
        The state, which rows are finite, and which changed.

    Raises:
        ValueError: if the backend is not available.
    """
    tokens = TokenDigits.of(digits, mask_index)
    if choose_backend(backend, logits) == "triton":
        from kernels.triton_ops.reveal import launch_reveal

        return Revealed(
            state, *launch_reveal(logits, state, positions, due, tokens, u, temperature, top_k, top_p)
        )
    revealed = _reveal_rows(tokens, logits, state[positions], due, u, temperature, top_k, top_p)
    state[positions[revealed.changed]] = revealed.y[revealed.changed]
    return revealed._replace(y=state)


def _reveal_rows(
    tokens: TokenDigits,
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    u: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> Revealed:
    """Draw for all rows: `reveal_tokens` on plain torch."""
    needed = due.any(-1)
    # amax hands NaN on, and NaN < inf is False
    finite = logits.amax(-1).lt(torch.inf) if logits.numel() else torch.ones_like(needed)
    drawn = torch.zeros(len(logits), dtype=torch.int64, device=y.device)
    # The tokens of one visible digit are few, and all others have no part in the draw.
    narrow = needed & y.ne(tokens.mask_index).any(-1)
    if bool(narrow.any()) and tokens.candidates is None:
        narrow = torch.zeros_like(narrow)
    per_row = (u, temperature, top_k, top_p)
    for rows in few_at_a_time(needed & ~narrow, logits.shape[1]):
        scores = logits[rows].float()
        if not bool(y[rows].eq(tokens.mask_index).all()):
            scores = torch.where(tokens.contradicted(y[rows]), -torch.inf, scores)
        drawn[rows], possible = draw_by_scores(
            scores, *(part if part is None else part[rows] for part in per_row)
        )
        finite[rows] &= possible
    if bool(narrow.any()):
        assert tokens.candidates is not None
        for rows in few_at_a_time(narrow, tokens.candidates.tokens.shape[1]):
            candidates, scores = _candidate_scores(tokens, logits, rows, y[rows])
            column, possible = draw_by_scores(
                scores, *(part if part is None else part[rows] for part in per_row)
            )
            drawn[rows] = candidates.gather(-1, column[:, None])[:, 0]
            finite[rows] &= possible
    finite |= ~needed
    written = tokens.table[drawn].to(y.dtype)
    return Revealed(torch.where(due & finite[:, None], written, y), finite, needed & finite)


def _candidate_scores(
    tokens: TokenDigits, logits: Tensor, rows: Tensor | slice, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens (R, K) with the first visible digit of y (R, S), and their scores: -inf for no candidate."""
    assert tokens.candidates is not None
    first = y.ne(tokens.mask_index).int().argmax(-1)
    line = first * tokens.mask_index + y.gather(-1, first[:, None])[:, 0].long()
    candidates = tokens.candidates.tokens.index_select(0, line)
    packed = tokens.candidates.packed.index_select(0, line)
    want, care = tokens.visible(y)
    care |= -(2**62)  # the sign is set only where a line is filled up
    differs = (packed ^ want[:, None].to(packed.dtype)).bitwise_and_(care[:, None].to(packed.dtype)).ne(0)
    scores = logits[rows].gather(-1, candidates).float()
    return candidates, torch.where(differs, -torch.inf, scores)
