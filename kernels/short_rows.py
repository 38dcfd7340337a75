"""Drawing tokens of a short vocabulary on a CPU, on numpy.

There an operation costs more than the numbers it works on, and the more so in a step of the sampler: the denoiser call
before it has emptied the caches. numpy's operations touch less code than torch's, and none of them wakes a second
thread, for which softmax, exp and large indexing wait milliseconds if others use the cores.

Shapes: R gathered rows (one token position each), V tokens, S digits a token, T tokens of a packed state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.token_digits import Fields, TokenDigits

Numbers = NDArray[Any]

_SCORES_AT_A_TIME = 2**15  # their arrays stay in the cache, and small enough for malloc to keep

_ONE = np.float32(1)  # no step to float64


class Drawn(NamedTuple):
    """Tokens that were drawn, for numpy.

    Attributes:
        token: (R,) int64.
        possible: (R,) bool, False where the logits hold NaN or +inf, or no finite one among the tokens that agree.
    """

    token: Numbers
    possible: Numbers


def is_short(tokens: TokenDigits) -> bool:
    """Return whether this is the way to draw such tokens; the choice depends on no row."""
    return tokens.fields is not None


def _fields(tokens: TokenDigits) -> Fields:
    assert tokens.fields is not None, "asked of `is_short`"
    return tokens.fields


def draw_short_rows(
    tokens: TokenDigits, logits: Tensor, y: Numbers, u: Tensor, temperature: Tensor | None
) -> Drawn:
    """Draw a token for every row that agrees with its visible digits, by inverse CDF, without truncation.

    Args:
        tokens: the digits of every token.
        logits: (R, V) floats.
        y: (R, S) integers, digits or ``mask_index`` where masked.
        u: (R,) float64 in (0, 1).
        temperature: (R,) float32; rows at 0 are drawn as at 1. None: 1 for every row.
    """
    scores = (logits.detach() if logits.requires_grad else logits).float().numpy()
    heat = None if temperature is None else temperature.numpy()
    size = max(1, _SCORES_AT_A_TIME // tokens.vocab_size)
    if len(y) <= size:
        return _draw(tokens, scores, y, u.numpy(), heat)
    chunks = [slice(start, start + size) for start in range(0, len(y), size)]
    parts = [
        _draw(tokens, scores[rows], y[rows], u.numpy()[rows], None if heat is None else heat[rows])
        for rows in chunks
    ]
    return Drawn(*map(np.concatenate, zip(*parts, strict=True)))


def _draw(tokens: TokenDigits, scores: Numbers, y: Numbers, u: Numbers, heat: Numbers | None) -> Drawn:
    """`draw_short_rows` of a few rows."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not possible ends in a total of NaN
        if tokens.num_digits > 1:  # else nothing is visible where something is due
            fields = _fields(tokens)
            # Added, so that NaN and +inf are seen also where tokens are excluded.
            scores = scores + fields.verdicts[y @ fields.place_values]
        weights = scores - scores.max(-1, keepdims=True)
        if heat is not None:
            weights /= np.where(heat > 0, heat, _ONE)[:, None]
        np.exp(weights, out=weights)
        mass = weights.cumsum(-1, dtype=np.float64)
        total = mass[:, -1]
        # The first token that reaches the target has a weight, as u > 0; and the last that has one reaches it, as
        # u < 1, though the product may be rounded up to the total.
        token = (mass >= (u * total)[:, None]).argmax(-1)
        return Drawn(token, total > 0)


def write_short_rows(
    tokens: TokenDigits, state: Numbers, at: Numbers, y: Numbers, write: Numbers, drawn: Drawn
) -> tuple[Numbers, Numbers]:
    """Write the digits that are due of the tokens that could be drawn into a packed state.

    Args:
        tokens: the digits of every token.
        state: (T, S) integers; written.
        at: (R,) int64, positions there, distinct where something is due.
        y: (R, S) integers, what the state holds there.
        write: (R, S) bool, what is due.
        drawn: the tokens.

    Returns:
        Which rows are finite and which changed, (R,) bool each, as `kernels.reveal.Revealed` has them.
    """
    token = drawn.token
    needed = write.any(-1)
    changed = needed & drawn.possible
    written = np.where(write, _fields(tokens).table[token], y)
    if changed.all():
        state[at] = written
        return changed, changed
    state[at[changed]] = written[changed]  # the other rows may have the positions of those that change
    return changed | ~needed, changed
