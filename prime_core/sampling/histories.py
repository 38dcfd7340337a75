"""Histories: when sub-tokens that a corrector also masks again are revealed, masked again and revealed anew.

Shapes: F free sub-tokens, A transitions of any of them, S digits a token, N steps.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.noise import Purpose, uniform
from prime_core.sampling.correctors import StepTables

# exp(-64) is far below the smallest uniform number, 2^-53: whoever spends this has surely moved.
_CERTAIN = 64.0


class Transitions(NamedTuple):
    """Sub-tokens that change between masked and visible, each in one step.

    Attributes:
        position: (A,) int64.
        digit: (A,) int64.
        step: (A,) int64, the step of each transition.
    """

    position: Tensor
    digit: Tensor
    step: Tensor


def draw_histories(
    position: Tensor, digit: Tensor, num_digits: int, tables: StepTables, seed: int
) -> tuple[Transitions, Transitions]:
    """Draw all transitions of sub-tokens that start masked, each from one uniform number.

    A sub-token that enters its state at the start of step k leaves it in step j with probability (1 - p_k) ...
    (1 - p_{j-1}) p_j, where p is ``reveal`` or ``remask``. With G_j = -sum_{i<j} log(1 - p_i) that is the first j with
    G_{j+1} - G_k > -log(1 - u). Transition n of a sub-token has the uniform number of purpose PLAN, its position and
    index digit + S n; so where the corrector has no strength, the plan is that without corrector.

    Args:
        position: (F,) int64.
        digit: (F,) int64.
        num_digits: S.
        tables: what can happen in each of N steps.
        seed: 0..2**64-1.

    Returns:
        All reveals and all remasks. What is masked after the last step is revealed in step N.
    """
    spent = [torch.cat([p.new_zeros(1), (-torch.log1p(-p)).clamp(max=_CERTAIN).cumsum(0)]) for p in tables]
    num_steps = len(tables.reveal)
    start = torch.zeros_like(position)
    reveals: list[Transitions] = []
    remasks = [Transitions(position[:0], digit[:0], start[:0])]
    for transition in itertools.count():
        masked = transition % 2 == 0
        exhausted = spent[0 if masked else 1]
        u = uniform(seed, position, digit + num_digits * transition, Purpose.PLAN)
        step = torch.searchsorted(exhausted, exhausted[start] - torch.log1p(-u), right=True) - 1
        if masked:
            reveals.append(Transitions(position, digit, step))
        moves = step < num_steps
        position, digit, step = position[moves], digit[moves], step[moves]
        if not len(position):
            break
        if not masked:
            remasks.append(Transitions(position, digit, step))
        start = step + 1
    return _joined(reveals), _joined(remasks)


def _joined(parts: list[Transitions]) -> Transitions:
    return Transitions(*(torch.cat(part) for part in zip(*parts, strict=True)))
