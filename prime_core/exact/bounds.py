"""Objectives and likelihoods of tiny models by exact enumeration: the yardstick of the estimators' tests.

With M = L S digits there are 2^M sets of masked digits; keep M at 12 or below. Nothing here shares code with
`objectives` or `likelihood`: probabilities are summed token by token.

Shapes: L tokens, S digits a token, M = L S digits, V tokens in the vocabulary, A = 2^M sets of masked digits.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser
from prime_core.schedule import Schedule

MAX_DIGITS = 12


class ExactObjectives(NamedTuple):
    """Exact values for one row, nats.

    Attributes:
        coded_loss: the published loss; for target_length > 1 it may lie below ``nll``.
        nelbo: the bound; never below ``nll``.
        nll: -log p(x_0) of the sampler that reveals one digit at a time in random order.
    """

    coded_loss: float
    nelbo: float
    nll: float


def exact_objectives(denoiser: Denoiser, codec: SubtokenCodec, x_0: Tensor) -> ExactObjectives:
    """Enumerate all sets of masked digits of one row of a time-free model.

    A set of n masked digits has the weight int_0^1 v^(n-1) (1 - v)^(M-n) dv = 1 / (n C(M, n)) in the objectives. The
    sampler's probability follows by recursion: with F(A) = p(digits in A | the others visible),
    F(A) = (1 / |A|) sum over j in A of p(y^j | y_A) F(A without j).

    Args:
        denoiser: a time-free network.
        codec: tokens <-> digits.
        x_0: (L,) tokens with L S <= 12.

    Raises:
        ValueError: if the row has more than 12 digits.
    """
    y_0 = codec.encode(x_0)
    num_digits = _checked_size(y_0)
    sets = list(itertools.product((False, True), repeat=num_digits))
    states = torch.stack([_masked(y_0, masked, codec) for masked in sets])
    probabilities = torch.softmax(denoiser(states).double(), -1)  # (A, L, V), before carry-over
    coded = nelbo = 0.0
    reach = {sets[0]: 1.0}  # nothing masked
    for masked, y, p in sorted(zip(sets, states, probabilities, strict=True), key=lambda item: sum(item[0])):
        n = sum(masked)
        if n == 0:
            continue
        per_digit, joint = _conditionals(codec, y, y_0, p)
        weight = 1 / (n * math.comb(num_digits, n))
        coded -= weight * sum(math.log(q) for q in joint)
        nelbo -= weight * sum(math.log(q) for q in per_digit.values())
        reach[masked] = sum(q * reach[_without(masked, j)] for j, q in per_digit.items()) / n
    return ExactObjectives(coded, nelbo, -math.log(reach[sets[-1]]))


def exact_grid_nelbo(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    x_0: Tensor,
    num_steps: int,
    eps: float = 0.0,
) -> float:
    """Enumerate all reveal plans of one row: the bound of the sampler that runs ``num_steps`` steps, in nats.

    Args:
        denoiser: the network; time-conditioned ones see the time of each step.
        codec: tokens <-> digits.
        schedule: gives the grid.
        x_0: (L,) tokens; (num_steps + 1)^(L S) plans are enumerated.
        num_steps: N.
        eps: last time of the grid.

    Raises:
        ValueError: if there are more than a million plans.
    """
    y_0 = codec.encode(x_0)
    times = schedule.time_grid(num_steps, eps)
    alpha = torch.cat([schedule.alpha_t(times), torch.ones(1, dtype=torch.float64)])
    share = (alpha.diff() / (1 - alpha[0])).tolist()
    if len(share) ** y_0.numel() > 10**6:
        raise ValueError(
            f"{len(share)}^{y_0.numel()} plans are too many to enumerate; use fewer steps or digits"
        )

    @cache
    def step_nll(before: tuple[bool, ...], after: tuple[bool, ...], t: float) -> float:
        """-log p of the digits revealed between two sets of masked digits; plans share most of their steps."""
        y, y_next = _masked(y_0, before, codec), _masked(y_0, after, codec)
        p = torch.softmax(denoiser(y[None], torch.tensor([t], dtype=torch.float64))[0].double(), -1)
        masses = [(_mass(codec, y[i], p[i]), _mass(codec, y_next[i], p[i])) for i in range(len(y))]
        return sum(math.log(mass / next_mass) for mass, next_mass in masses)

    total = 0.0
    for plan in itertools.product(range(len(share)), repeat=y_0.numel()):
        weight = math.prod(share[k] for k in plan)
        for k in set(plan) if weight else ():
            before, after = tuple(j >= k for j in plan), tuple(j > k for j in plan)
            total += weight * step_nll(before, after, float(times[min(k, num_steps)]))
    return total


def _conditionals(
    codec: SubtokenCodec, y: Tensor, y_0: Tensor, p: Tensor
) -> tuple[dict[int, float], list[float]]:
    """Probability of each masked digit (by its flat index) and of each token, given the visible digits."""
    per_digit, joint = {}, []
    num_tokens, target_length = y.shape
    for i in range(num_tokens):
        mass = _mass(codec, y[i], p[i])
        joint.append(_mass(codec, y_0[i], p[i]) / mass)
        for j in range(target_length):
            if y[i, j] == codec.mask_index:
                known = y[i].clone()
                known[j] = y_0[i, j]
                per_digit[i * target_length + j] = _mass(codec, known, p[i]) / mass
    return per_digit, joint


def _mass(codec: SubtokenCodec, y: Tensor, p: Tensor) -> float:
    """Probability of the tokens that agree with the visible digits y (S,), one by one."""
    visible = [(j, int(v)) for j, v in enumerate(y) if v != codec.mask_index]
    digits = codec.digits.tolist()
    agreeing = (q for token, q in enumerate(p.tolist()) if all(digits[token][j] == v for j, v in visible))
    return float(sum(agreeing))


def _masked(y_0: Tensor, masked: tuple[bool, ...], codec: SubtokenCodec) -> Tensor:
    return torch.where(torch.tensor(masked).view(y_0.shape), codec.mask_index, y_0)


def _without(masked: tuple[bool, ...], j: int) -> tuple[bool, ...]:
    return (*masked[:j], False, *masked[j + 1 :])


def _checked_size(y_0: Tensor) -> int:
    if y_0.numel() > MAX_DIGITS:
        raise ValueError(f"a row of {y_0.numel()} digits is too long to enumerate; at most {MAX_DIGITS}")
    return y_0.numel()
