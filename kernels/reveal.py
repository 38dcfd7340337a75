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
from kernels.draw import (
    block_sums,
    columns_of,
    draw_blocks,
    draw_by_scores,
    draw_inside,
    few_at_a_time,
    kept_weights,
)
from kernels.short_rows import draw_short_rows, is_short, write_short_rows
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
    temperature: Tensor | None,
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
        temperature: (R,) float32, at least 0; 0 takes the most probable token (the lowest id of equals). None: 1 for
            every row.
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
    rows = _Rows(logits, y, u, temperature, top_k, top_p)
    if is_short(tokens):
        y = y.clone()
        return Revealed(y, *_reveal_short_rows(tokens, rows._replace(y=y), torch.arange(len(y)), due))
    return _reveal_rows(tokens, rows, due)


def reveal_tokens_(
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
    """Write the digits that are due straight into a packed state: `reveal_tokens` in place.

    Args:
        logits: (R, V) as in `reveal_tokens`.
        state: (T, S) integers, the digits of all tokens; written.
        positions: (R,) int64 in 0..T-1, which token of the state a row is. Positions of rows where something is due
            are distinct; rows where nothing is due may repeat any.
        due: (R, S) as in `reveal_tokens`, like all that follow.
        digits: the digits of every token.
        u: (R,) float64.
        temperature: (R,) float32 or None.
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
    rows = _Rows(logits, state, u, temperature, top_k, top_p)
    if is_short(tokens):
        return Revealed(state, *_reveal_short_rows(tokens, rows, positions, due))
    revealed = _reveal_rows(tokens, rows._replace(y=state[positions]), due)
    write_changed(state, positions, revealed)
    return revealed._replace(y=state)


def write_changed(state: Tensor, positions: Tensor, revealed: Revealed) -> None:
    """Write the digits of the rows that changed into a packed state; the positions of the others may repeat any.

    Args:
        state: (T, S), written.
        positions: (R,) int64.
        revealed: of the R rows.
    """
    if bool(revealed.changed.all()):
        state[positions] = revealed.y
    else:
        state[positions[revealed.changed]] = revealed.y[revealed.changed]


class _Rows(NamedTuple):
    """How rows are drawn; see `reveal_tokens`."""

    logits: Tensor
    y: Tensor
    u: Tensor
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None

    def select(self, rows: Tensor | slice) -> _Rows:
        return self.settings_of(rows)._replace(logits=self.logits[rows])

    def settings_of(self, rows: Tensor | slice) -> _Rows:
        """Select everything but the logits, which stay those of all rows."""
        optional = (self.temperature, self.top_k, self.top_p)
        selected = (None if part is None else part[rows] for part in optional)
        return _Rows(self.logits, self.y[rows], self.u[rows], *selected)

    def plain(self) -> Tensor:
        """Which rows (R,) are drawn from all their weights."""
        plain = (
            torch.ones_like(self.u, dtype=torch.bool) if self.temperature is None else self.temperature > 0
        )
        if self.top_k is not None:
            plain &= (self.top_k <= 0) | (self.top_k >= self.logits.shape[-1])
        if self.top_p is not None:
            plain &= self.top_p >= 1
        return plain


def _reveal_rows(tokens: TokenDigits, rows: _Rows, due: Tensor) -> Revealed:
    """Draw for all rows: `reveal_tokens` on plain torch."""
    needed = due.any(-1)
    best = rows.logits.amax(-1)
    # The tokens of one visible digit are few, and all others have no part in the draw.
    narrow = needed & rows.y.ne(tokens.mask_index).any(-1)
    if bool(narrow.any()) and tokens.candidates is None:
        narrow = torch.zeros_like(narrow)
    plain = rows.plain()
    token = torch.zeros(len(best), dtype=torch.int64, device=best.device)
    possible = torch.ones_like(needed)
    for kind, draw in (
        (needed & ~narrow & plain, _draw_plain),
        (needed & ~narrow & ~plain, _draw_wide),
        (narrow, _draw_narrow),
    ):
        chosen = kind.nonzero()[:, 0]
        if len(chosen):
            token[chosen], possible[chosen] = draw(tokens, rows, chosen)
    return _written(tokens, rows.y, due, token, possible & best.lt(torch.inf))


def _reveal_short_rows(
    tokens: TokenDigits, rows: _Rows, positions: Tensor, due: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw for rows of few tokens on a CPU.

    Args:
        tokens: the digits of every token.
        rows: how they are drawn; ``y`` is a whole packed state (T, S), which is written.
        positions: (R,) of the rows there.
        due: (R, S) bool.

    Returns:
        Which rows are finite and which changed, (R,) bool each.
    """
    state, at = rows.y.numpy(), positions.numpy()
    y = state[at]
    drawn = draw_short_rows(tokens, rows.logits, y, rows.u, rows.temperature)
    if rows.temperature is not None or rows.top_k is not None or rows.top_p is not None:
        chosen = (due.any(-1) & ~rows.plain()).nonzero()[:, 0]
        if len(chosen):  # greedy or truncated: they are drawn again
            token, possible = _draw_wide(tokens, rows._replace(y=torch.from_numpy(y)), chosen)
            drawn.token[chosen.numpy()] = token.numpy()
            drawn.possible[chosen.numpy()] &= possible.numpy()
    finite, changed = write_short_rows(tokens, state, at, y, due.numpy(), drawn)
    return torch.from_numpy(finite), torch.from_numpy(changed)


def _written(tokens: TokenDigits, y: Tensor, due: Tensor, token: Tensor, possible: Tensor) -> Revealed:
    """Write the digits that are due of the tokens (R,) where they could be drawn.

    Args:
        tokens: the digits of every token.
        y: (R, S) before.
        due: (R, S) bool.
        token: (R,) int64.
        possible: (R,) bool. Written `amax() < inf`, so that NaN, which `amax` hands on, is not possible.
    """
    needed = due.any(-1)
    finite = possible | ~needed
    written = tokens.table[token].to(y.dtype)
    return Revealed(torch.where(due & finite[:, None], written, y), finite, needed & finite)


def _draw_plain(tokens: TokenDigits, rows: _Rows, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the tokens of rows without truncation: one pass over the logits, and another over one block of them."""
    vocab_size = rows.logits.shape[-1]
    parts = []
    for part in few_at_a_time(chosen, vocab_size):
        few = rows.select(part)
        scores = _scores(tokens, few)
        best = scores.amax(-1)
        parts.append((best, block_sums(kept_weights(scores, best, few.temperature, None, None))))
    best, sums = (torch.cat(part) for part in zip(*parts, strict=True))
    block, share = draw_blocks(sums, rows.u[chosen])
    columns = columns_of(block, vocab_size)
    inside = columns.clamp(max=vocab_size - 1)
    want, care = (part[:, None].to(tokens.packed.dtype) for part in tokens.visible(rows.y[chosen]))
    excluded = (columns >= vocab_size) | ((tokens.packed[inside] ^ want) & care).ne(0)
    scores = torch.where(excluded, -torch.inf, rows.logits[chosen[:, None], inside].float())
    temperature = None if rows.temperature is None else rows.temperature[chosen]
    weights = kept_weights(scores, scores.amax(-1), temperature, None, None)
    return draw_inside(block, weights, share), best.gt(-torch.inf)


def _draw_wide(tokens: TokenDigits, rows: _Rows, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the tokens of rows of any kind."""
    parts = []
    for part in few_at_a_time(chosen, rows.logits.shape[-1]):
        few = rows.select(part)
        parts.append(draw_by_scores(_scores(tokens, few), few.u, few.temperature, few.top_k, few.top_p))
    token, possible = (torch.cat(part) for part in zip(*parts, strict=True))
    return token, possible


def _draw_narrow(tokens: TokenDigits, rows: _Rows, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the tokens of rows with a visible digit, from the tokens that have it."""
    assert tokens.candidates is not None
    parts = []
    for part in few_at_a_time(chosen, tokens.candidates.tokens.shape[1]):
        few = rows.settings_of(part)
        candidates, excluded = _candidates(tokens, few.y)
        if isinstance(part, slice):
            logits = rows.logits[part].gather(-1, candidates)
        else:  # whole rows are not copied
            logits = rows.logits[part[:, None], candidates]
        scores = torch.where(excluded, -torch.inf, logits.float())
        column, possible = draw_by_scores(scores, few.u, few.temperature, few.top_k, few.top_p)
        parts.append((candidates.gather(-1, column[:, None])[:, 0], possible))
    token, possible = (torch.cat(part) for part in zip(*parts, strict=True))
    return token, possible


def _scores(tokens: TokenDigits, rows: _Rows) -> Tensor:
    """Return the logits (R, V) of the tokens that agree with the visible digits, -inf for the others."""
    scores = rows.logits.float()
    if bool(rows.y.eq(tokens.mask_index).all()):
        return scores
    return torch.where(tokens.contradicted(rows.y), -torch.inf, scores)


def _candidates(tokens: TokenDigits, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (R, K) with the first visible digit of y (R, S), and which of them are excluded (R, K)."""
    assert tokens.candidates is not None
    first = y.ne(tokens.mask_index).int().argmax(-1)
    line = first * tokens.mask_index + y.gather(-1, first[:, None])[:, 0]
    packed = tokens.candidates.packed.index_select(0, line)
    want, care = (part[:, None].to(packed.dtype) for part in tokens.visible(y))
    care |= torch.iinfo(packed.dtype).min  # the sign is set only where a line is filled up
    excluded = (packed ^ want).bitwise_and_(care).ne(0)
    return tokens.candidates.tokens.index_select(0, line), excluded
