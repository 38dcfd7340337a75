"""Laws of samplers on tiny models, by exact enumeration: the yardstick of the sampler's tests.

`dense_ancestral_law` is written from the per-step reveal probabilities of ancestral sampling on a grid and
knows nothing of plans; `planned_law` sums over all reveal plans. Nothing here shares code with
`kernels.reveal`: probabilities are summed token by token in Python floats. A law is a map from a row's tokens
to a probability.

Shapes: L tokens, S digits a token, M = L S digits; keep M at 6 or below and grids short.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prime_core.canvas import Canvas
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser
from prime_core.plan import RevealPlan, gather_events
from prime_core.schedule import Schedule
from prime_core.stepper import SamplingSettings

# The digits of one token, the digits of a row, and probabilities of rows and of a row's tokens.
Digits = tuple[int, ...]
State = tuple[Digits, ...]
StateLaw = Mapping[State, float]
TokenLaw = dict[tuple[int, ...], float]

_PLAIN = SamplingSettings()


def enumerate_states(codec: SubtokenCodec, length: int) -> list[State]:
    """Return every partly masked row of ``length`` tokens whose digits agree with some token each."""
    values = itertools.product(range(codec.base + 1), repeat=codec.target_length)
    tokens = [digits for digits in values if _consistent(codec, digits)]
    return list(itertools.product(tokens, repeat=length))


def dense_ancestral_law(
    model: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    grid: Tensor,
    canvas: Canvas,
    settings: SamplingSettings = _PLAIN,
) -> TokenLaw:
    """Return the law of ancestral sampling that calls the network in every step of the grid.

    In the step from t to s each masked digit is revealed with probability (alpha_s - alpha_t) / (1 -
    alpha_t), independently; the digits of one token that are revealed together are those of one draw of the
    token. What is masked at the end of the grid is revealed there.

    Args:
        model: the network.
        codec: tokens to digits.
        schedule: noise schedule.
        grid: (N + 1,) float64, 1 = t_0 > ... > t_N.
        canvas: what is known.
        settings: how tokens are drawn.

    Returns:
        Probability of every row of tokens (L integers) that can occur.
    """
    law: StateLaw = {_state(canvas.y): 1.0}
    alphas = schedule.alpha_t(grid).tolist()
    for t, alpha_t, alpha_s in zip(grid.tolist(), alphas, alphas[1:], strict=False):
        law = _dense_step(model, codec, law, t, (alpha_s - alpha_t) / (1 - alpha_t), settings)
    law = _dense_step(model, codec, law, float(grid[-1]), 1.0, settings)
    return _tokens_of(codec, law)


def planned_law(
    model: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    grid: Tensor,
    canvas: Canvas,
    settings: SamplingSettings = _PLAIN,
) -> TokenLaw:
    """Return the law of the planned sampler: the sum over all plans of the plan's probability times its law.

    Arguments and result are those of `dense_ancestral_law`. A digit has the probability
    (alpha_{t_{k+1}} - alpha_{t_k}) / (1 - alpha_1) of step k, and the rest of being left over.
    """
    num_steps = len(grid) - 1
    alphas = schedule.alpha_t(grid)
    shares = torch.cat([alphas.diff(), 1 - alphas[-1:]]) / (1 - alphas[0])
    position, digit = canvas.free.nonzero(as_tuple=True)
    total: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for steps in itertools.product(range(num_steps + 1), repeat=len(position)):
        weight = math.prod(float(shares[step]) for step in steps)
        if weight > 0:
            plan = gather_events(
                position, digit, torch.tensor(steps, dtype=torch.int64), (*canvas.y.shape,), grid, 0
            )
            for tokens, probability in plan_law(model, codec, plan, canvas, settings).items():
                total[tokens] += weight * probability
    return dict(total)


def plan_law(
    model: Denoiser,
    codec: SubtokenCodec,
    plan: RevealPlan,
    canvas: Canvas,
    settings: SamplingSettings = _PLAIN,
) -> TokenLaw:
    """Return the law of the sampler that follows one given plan."""
    law: StateLaw = {_state(canvas.y): 1.0}
    for event in plan.events:
        due = {int(position): d.tolist() for position, d in zip(event.positions, event.due, strict=True)}
        result: defaultdict[State, float] = defaultdict(float)
        for state, probability, logits in _evaluate(model, codec, law, event.t):
            outcomes = [
                _reveal(codec, token_logits, digits, due[index], settings) if index in due else {digits: 1.0}
                for index, (digits, token_logits) in enumerate(zip(state, logits, strict=True))
            ]
            _add_products(result, probability, outcomes)
        law = result
    return _tokens_of(codec, law)


def first_hitting_law(
    model: Denoiser, codec: SubtokenCodec, canvas: Canvas, settings: SamplingSettings = _PLAIN
) -> TokenLaw:
    """Return the law of "exact" steps for a time-free model: one masked digit at a time, in uniform order."""
    law: StateLaw = {_state(canvas.y): 1.0}
    for num_masked in range(int(canvas.free.sum()), 0, -1):
        result: defaultdict[State, float] = defaultdict(float)
        for state, probability, logits in _evaluate(model, codec, law, 0.5):
            for index, digits in enumerate(state):
                for due in _single_digits(digits, codec.mask_index):
                    outcome = _reveal(codec, logits[index], digits, due, settings)
                    outcomes = [outcome if other == index else {d: 1.0} for other, d in enumerate(state)]
                    _add_products(result, probability / num_masked, outcomes)
        law = result
    return _tokens_of(codec, law)


def sequence_nll(law: TokenLaw, x_0: Tensor) -> float:
    """Return -log of a row's probability under a law, in nats; infinite where it cannot occur.

    Args:
        law: as `dense_ancestral_law` returns it.
        x_0: (L,) tokens.
    """
    probability = law.get(tuple(x_0.tolist()), 0.0)
    return -math.log(probability) if probability > 0 else math.inf


def total_variation(first: TokenLaw, second: TokenLaw) -> float:
    """Return half the sum of absolute differences of two laws."""
    return 0.5 * sum(abs(first.get(key, 0.0) - second.get(key, 0.0)) for key in first.keys() | second.keys())


def token_law(
    codec: SubtokenCodec, logits: list[float], visible: Digits, settings: SamplingSettings
) -> list[float]:
    """Return the probability of every token: temperature, carry-over filter, top k, top p, renormalised.

    Args:
        codec: tokens to digits.
        logits: V numbers.
        visible: S digits, ``mask_index`` where masked.
        settings: how tokens are drawn.
    """
    digits = codec.digits.tolist()
    allowed = [x for x in range(codec.vocab_size) if _agrees(digits[x], visible, codec.mask_index)]
    order = sorted(allowed, key=lambda x: -logits[x])  # stable: of equals the lowest id comes first
    if settings.temperature == 0:
        return [float(x == order[0]) for x in range(codec.vocab_size)]
    weights = {x: math.exp((logits[x] - logits[order[0]]) / settings.temperature) for x in order}
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


def _dense_step(
    model: Denoiser, codec: SubtokenCodec, law: StateLaw, t: float, reveal: float, settings: SamplingSettings
) -> StateLaw:
    """One step of ancestral sampling, in which every masked digit is revealed with probability ``reveal``."""
    result: defaultdict[State, float] = defaultdict(float)
    for state, probability, logits in _evaluate(model, codec, law, t):
        outcomes = [
            _dense_token(codec, token_logits, digits, reveal, settings)
            for digits, token_logits in zip(state, logits, strict=True)
        ]
        _add_products(result, probability, outcomes)
    return result


def _dense_token(
    codec: SubtokenCodec, logits: list[float], digits: Digits, reveal: float, settings: SamplingSettings
) -> dict[Digits, float]:
    """Law of one token's digits after a dense step: draw the token, then decide digit by digit what shows."""
    if codec.mask_index not in digits:
        return {digits: 1.0}
    result: defaultdict[Digits, float] = defaultdict(float)
    full = codec.digits.tolist()
    for x, probability in enumerate(token_law(codec, logits, digits, settings)):
        if probability == 0:
            continue
        choices = [
            [(old, 1.0)] if old != codec.mask_index else [(old, 1 - reveal), (new, reveal)]
            for old, new in zip(digits, full[x], strict=True)
        ]
        for choice in itertools.product(*choices):
            weight = math.prod(share for _, share in choice)
            if weight > 0:
                result[tuple(digit for digit, _ in choice)] += probability * weight
    return result


def _reveal(
    codec: SubtokenCodec, logits: list[float], digits: Digits, due: list[bool], settings: SamplingSettings
) -> dict[Digits, float]:
    """Law of one token's digits after ONE draw of the token writes the digits that are due."""
    result: defaultdict[Digits, float] = defaultdict(float)
    full = codec.digits.tolist()
    for x, probability in enumerate(token_law(codec, logits, digits, settings)):
        if probability > 0:
            written = tuple(new if d else old for old, new, d in zip(digits, full[x], due, strict=True))
            result[written] += probability
    return result


def _evaluate(
    model: Denoiser, codec: SubtokenCodec, law: StateLaw, t: float
) -> Iterator[tuple[State, float, list[list[float]]]]:
    """Call the network once on all states of a law: (state, its probability, its L x V logits)."""
    states = list(law)
    times = torch.full((len(states),), t, dtype=torch.float64)
    logits = model(torch.tensor(states).reshape(len(states), -1, codec.target_length), times).double()
    for state, row in zip(states, logits, strict=True):
        yield state, law[state], row.tolist()


def _add_products(law: defaultdict[State, float], weight: float, outcomes: list[dict[Digits, float]]) -> None:
    """Add ``weight`` times the product of independent laws of tokens to a law of rows."""
    for parts in itertools.product(*(outcome.items() for outcome in outcomes)):
        law[tuple(digits for digits, _ in parts)] += weight * math.prod(share for _, share in parts)


def _tokens_of(codec: SubtokenCodec, law: StateLaw) -> TokenLaw:
    return {tuple(codec.decode(torch.tensor(state)).tolist()): p for state, p in law.items() if p > 0}


def _state(y: Tensor) -> State:
    return tuple(tuple(digits) for digits in y.tolist())


def _single_digits(digits: Digits, mask_index: int) -> Iterator[list[bool]]:
    for index, digit in enumerate(digits):
        if digit == mask_index:
            yield [other == index for other in range(len(digits))]


def _consistent(codec: SubtokenCodec, digits: Digits) -> bool:
    return any(_agrees(full, digits, codec.mask_index) for full in codec.digits.tolist())


def _agrees(full: list[int], visible: Digits, mask_index: int) -> bool:
    return all(old in (mask_index, new) for old, new in zip(visible, full, strict=True))
