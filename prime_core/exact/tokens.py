"""Laws of the digits of one token, by enumeration: the yardstick of the kernels that draw tokens.

Nothing here shares code with `kernels`: probabilities are summed token by token in Python floats.

Shapes: S digits a token, V tokens.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from prime_core.codec import SubtokenCodec
from prime_core.sampling.settings import SamplingSettings

# The digits of one token, ``mask_index`` where masked.
Digits = tuple[int, ...]


def token_law(
    codec: SubtokenCodec, logits: list[float], visible: Digits, settings: SamplingSettings, t: float = 1.0
) -> list[float]:
    """Return the probability of every token: temperature, carry-over filter, top k, top p, renormalised.

    Args:
        codec: tokens to digits.
        logits: V numbers.
        visible: S digits, ``mask_index`` where masked.
        settings: how tokens are drawn.
        t: noise time, for a temperature that depends on it.
    """
    digits = codec.digits.tolist()
    allowed = [x for x in range(codec.vocab_size) if agrees(digits[x], visible, codec.mask_index)]
    order = sorted(allowed, key=lambda x: -logits[x])  # stable: of equals the lowest id comes first
    temperature = settings.temperature_at(t)
    if temperature == 0:
        return [float(x == order[0]) for x in range(codec.vocab_size)]
    weights = {x: math.exp((logits[x] - logits[order[0]]) / temperature) for x in order}
    if settings.top_k > 0:
        order = order[: settings.top_k]
    if settings.top_p < 1:
        limit = settings.top_p * sum(weights[x] for x in order)
        before = itertools.accumulate((weights[x] for x in order), initial=0.0)
        order = [x for x, mass in zip(order, before, strict=False) if mass < limit]
    total = sum(weights[x] for x in order)
    law = [0.0] * codec.vocab_size
    for x in order:
        law[x] = weights[x] / total
    return law


def digit_laws(
    codec: SubtokenCodec, logits: list[float], settings: SamplingSettings, t: float = 1.0
) -> list[dict[int, float]]:
    """Return the marginal law of every digit under the law of the whole token, whatever is visible."""
    laws: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(codec.target_length)]
    nothing_visible = (codec.mask_index,) * codec.target_length
    for full, probability in zip(
        codec.digits.tolist(), token_law(codec, logits, nothing_visible, settings, t), strict=True
    ):
        for law, value in zip(laws, full, strict=True):
            law[value] += probability
    return [dict(law) for law in laws]


def reveal_law(
    codec: SubtokenCodec,
    logits: list[float],
    digits: Digits,
    due: list[bool],
    settings: SamplingSettings,
    t: float = 1.0,
) -> dict[Digits, float]:
    """Return the law of one token's digits after the digits that are due are revealed.

    They are those of ONE draw of the token ("joint"), or each has a draw of its own ("marginal").
    """
    if settings.draw == "marginal":
        alone = digit_laws(codec, logits, settings, t)
        return independent(law if d else {old: 1.0} for old, law, d in zip(digits, alone, due, strict=True))
    result: defaultdict[Digits, float] = defaultdict(float)
    full = codec.digits.tolist()
    for x, probability in enumerate(token_law(codec, logits, digits, settings, t)):
        if probability > 0:
            written = tuple(new if d else old for old, new, d in zip(digits, full[x], due, strict=True))
            result[written] += probability
    return result


def step_law(
    codec: SubtokenCodec,
    logits: list[float],
    digits: Digits,
    free: list[bool],
    chances: tuple[float, float],
    settings: SamplingSettings,
    t: float,
) -> dict[Digits, float]:
    """Return the law of one token's digits after a dense step, which decides digit by digit what happens.

    Args:
        codec: tokens to digits.
        logits: V numbers.
        digits: S digits at the start of the step.
        free: S flags; digits that are not free never change.
        chances: probability that a masked digit is revealed, and that a visible free one is masked.
        settings: how tokens are drawn.
        t: noise time at the start of the step.
    """
    reveal, remask = chances
    mask = codec.mask_index
    # Whether each digit moves is decided on its own; then the masked ones that move are drawn together.
    result: defaultdict[Digits, float] = defaultdict(float)
    for moves in itertools.product((False, True), repeat=len(digits)):
        chance = [reveal if old == mask else remask * f for old, f in zip(digits, free, strict=True)]
        weight = math.prod(c if move else 1 - c for c, move in zip(chance, moves, strict=True))
        if weight == 0:
            continue
        due = [move and old == mask for old, move in zip(digits, moves, strict=True)]
        shown = reveal_law(codec, logits, digits, due, settings, t) if any(due) else {digits: 1.0}
        for new, probability in shown.items():
            hidden = (move and old != mask for old, move in zip(digits, moves, strict=True))
            result[tuple(mask if h else v for v, h in zip(new, hidden, strict=True))] += weight * probability
    return result


def independent(laws: Iterable[Mapping[int, float]]) -> dict[Digits, float]:
    """Return the joint law of independent digits."""
    return {
        tuple(digit for digit, _ in choice): math.prod(p for _, p in choice)
        for choice in itertools.product(*(law.items() for law in laws))
    }


def agrees(full: list[int], visible: Digits, mask_index: int) -> bool:
    """Return whether the digits of a token agree with what is visible."""
    return all(old in (mask_index, new) for old, new in zip(visible, full, strict=True))
