"""Laws of samplers on tiny models, by exact enumeration: the yardstick of the sampler's tests.

`dense_ancestral_law` and `dense_chain_law` are written from the probabilities of every single step and know nothing
of plans; `planned_law` sums over all plans (`exact_histories` does so where digits are masked again). Probabilities
of one token come from `exact_tokens`. A law is a map from a row's tokens to a probability.

Shapes: L tokens, S digits a token, M = L S digits, N steps; keep M at 6 or below and grids short.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.exact.tokens import Digits, agrees, reveal_law, step_law
from prime_core.models.denoiser import Denoiser
from prime_core.sampling.canvas import Canvas
from prime_core.sampling.correctors import StepTables
from prime_core.sampling.curves import TemperatureCurve
from prime_core.sampling.plan import RevealPlan, gather_events
from prime_core.sampling.settings import SamplingSettings
from prime_core.schedule import Schedule

# The digits of a row, and probabilities of rows and of a row's tokens.
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
    alphas = schedule.alpha_t(grid)
    reveal = alphas.diff() / (1 - alphas[:-1])
    return dense_chain_law(model, codec, grid, StepTables(reveal, 0 * reveal), canvas, settings)


def dense_chain_law(
    model: Denoiser,
    codec: SubtokenCodec,
    times: Tensor,
    tables: StepTables,
    canvas: Canvas,
    settings: SamplingSettings = _PLAIN,
) -> TokenLaw:
    """Return the law of the sampler that calls the network in every step, and reveals and masks digit by digit.

    A digit that is masked at the start of step k is revealed in it with probability ``tables.reveal[k]``, a free one
    that is visible is masked with probability ``tables.remask[k]``, each independently. What is masked at the end is
    revealed there.

    Args:
        model: the network.
        codec: tokens to digits.
        times: (N + 1,) float64, the times of the grid.
        tables: what can happen in each of N steps.
        canvas: what is known, and is never masked.
        settings: how tokens are drawn.

    Returns:
        Probability of every row of tokens (L integers) that can occur.
    """
    law: StateLaw = {_state(canvas.y): 1.0}
    chances = [*zip(tables.reveal.tolist(), tables.remask.tolist(), strict=True), (1.0, 0.0)]
    for t, chance in zip(times.tolist(), chances, strict=True):
        result: defaultdict[State, float] = defaultdict(float)
        for state, probability, logits in _evaluate(model, codec, law, t):
            tokens = zip(state, logits, canvas.free.tolist(), strict=True)
            outcomes = [
                step_law(codec, token_logits, digits, free, chance, settings, t)
                for digits, token_logits, free in tokens
            ]
            _add_products(result, probability, outcomes)
        law = result
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
        law = _masked_again(law, event.remasked.tolist(), codec)
        due = {int(position): d.tolist() for position, d in zip(event.positions, event.due, strict=True)}
        result: defaultdict[State, float] = defaultdict(float)
        for state, probability, logits in _evaluate(model, codec, law, event.t):
            outcomes = [
                reveal_law(codec, token_logits, digits, due[index], settings, event.t)
                if index in due
                else {digits: 1.0}
                for index, (digits, token_logits) in enumerate(zip(state, logits, strict=True))
            ]
            _add_products(result, probability, outcomes)
        law = result
    return _tokens_of(codec, law)


def first_hitting_law(
    model: Denoiser, codec: SubtokenCodec, canvas: Canvas, settings: SamplingSettings = _PLAIN
) -> TokenLaw:
    """Return the law of "exact" steps for a time-free model: one masked digit at a time, in uniform order.

    The temperature must be a number: a curve would need the times, which are continuous here.
    """
    assert not isinstance(settings.temperature, TemperatureCurve)
    law: StateLaw = {_state(canvas.y): 1.0}
    for num_masked in range(int(canvas.free.sum()), 0, -1):
        result: defaultdict[State, float] = defaultdict(float)
        for state, probability, logits in _evaluate(model, codec, law, 0.5):
            for index, digits in enumerate(state):
                for due in _single_digits(digits, codec.mask_index):
                    outcome = reveal_law(codec, logits[index], digits, due, settings)
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


def _masked_again(law: StateLaw, flat: list[int], codec: SubtokenCodec) -> StateLaw:
    """Law of rows after masking some digits, given by position S + digit."""
    result: defaultdict[State, float] = defaultdict(float)
    for state, probability in law.items():
        digits = [list(token) for token in state]
        for index in flat:
            digits[index // codec.target_length][index % codec.target_length] = codec.mask_index
        result[tuple(tuple(token) for token in digits)] += probability
    return result


def _state(y: Tensor) -> State:
    return tuple(tuple(digits) for digits in y.tolist())


def _single_digits(digits: Digits, mask_index: int) -> Iterator[list[bool]]:
    for index, digit in enumerate(digits):
        if digit == mask_index:
            yield [other == index for other in range(len(digits))]


def _consistent(codec: SubtokenCodec, digits: Digits) -> bool:
    return any(agrees(full, digits, codec.mask_index) for full in codec.digits.tolist())
