"""The reveal plan: when every free sub-token of a row is revealed, drawn before the network is first called.

In ancestral sampling on a grid 1 = t_0 > ... > t_N = eps a masked sub-token is revealed in step k, from t =
t_k to s = t_{k+1}, with probability (alpha_s - alpha_t) / (1 - alpha_t) (MDLM, arXiv 2406.07524, eq. 7). That
depends on no value, so the step can be drawn first (DNDM, arXiv 2312.09193): a sub-token that is masked at t
= 1 is revealed in step k with probability (alpha_{t_{k+1}} - alpha_{t_k}) / (1 - alpha_1). Steps without a
reveal do not exist.

Shapes: L tokens, S digits a token, E events, P positions of one event, T positions of all events, F free
sub-tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.noise import Purpose, uniform
from prime_core.schedule import Schedule

Steps = int | Literal["exact"]


@dataclass(frozen=True, eq=False, slots=True)
class Event:
    """One denoiser call of a row: what it reveals.

    Attributes:
        step: index of the grid step; ``num_steps`` for the leftovers at the end of the grid.
        t: noise time at which the denoiser is evaluated.
        positions: (P,) int64, the tokens that change, ascending.
        due: (P, S) bool, their digits that are revealed; at least one each.
    """

    step: int
    t: float
    positions: Tensor
    due: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class RevealPlan:
    """The events of one row in order, in flat tensors: a row of "exact" steps has thousands of events.

    Attributes:
        steps: (E,) int64, the grid step of every event, ascending.
        times: (E,) float64, the noise time of every event.
        offsets: (E + 1,) int64; event e holds ``offsets[e]:offsets[e + 1]`` of ``positions`` and ``due``.
        positions: (T,) int64, the tokens of all events, event by event.
        due: (T, S) bool, their digits that are revealed.
        num_steps: number of steps of the grid.
    """

    steps: Tensor
    times: Tensor
    offsets: Tensor
    positions: Tensor
    due: Tensor
    num_steps: int

    @property
    def nfe(self) -> int:
        """Denoiser calls of this row: the number of function evaluations."""
        return len(self.steps)

    @property
    def events(self) -> Iterator[Event]:
        """All events in order, each made when it is asked for."""
        return (self.event(index) for index in range(self.nfe))

    def event(self, index: int) -> Event:
        """Return one event; its tensors are views of the plan.

        Args:
            index: 0..nfe-1.

        Raises:
            IndexError: if there is no such event.
        """
        if not 0 <= index < self.nfe:
            raise IndexError(f"index must be in 0..{self.nfe - 1}, got {index}")
        start, stop = self.offsets[index : index + 2].tolist()
        return Event(
            int(self.steps[index]), float(self.times[index]), self.positions[start:stop], self.due[start:stop]
        )


def draw_plan(free: Tensor, schedule: Schedule, steps: Steps, seed: int, eps: float = 0.0) -> RevealPlan:
    """Draw the reveal plan of a row.

    Each free sub-token has one uniform number u (purpose PLAN, its position, its digit) and is revealed when
    alpha reaches alpha_1 + (1 - alpha_1) u.

    Args:
        free: (L, S) bool, the masked sub-tokens.
        schedule: noise schedule.
        steps: number of grid steps N >= 1, or "exact" for N -> infinity: one sub-token an event (the
            first-hitting sampler, arXiv 2409.02908).
        seed: 0..2**64-1.
        eps: end of the grid in [0, 1). What is still masked there is revealed in one more event at t = eps.

    Raises:
        ValueError: if ``steps``, ``seed`` or ``eps`` is out of range, or ``eps`` is given for "exact" steps.
    """
    check_steps(steps)
    position, digit = free.nonzero(as_tuple=True)
    u = uniform(seed, position, digit, Purpose.PLAN)
    alpha_final = schedule.alpha_final()
    alpha = alpha_final + (1 - alpha_final) * u
    if steps == "exact":
        if eps != 0:
            raise ValueError("eps must be 0 when steps is 'exact': there is no grid to end early")
        order = alpha.argsort(stable=True)
        step = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return gather_events(position, digit, step, free.shape, schedule.inverse(alpha[order]), len(order))
    times = schedule.time_grid(steps, eps)
    last = steps if eps > 0 else steps - 1  # alpha_0 = 1, but rounding may leave it, or `alpha`, an ulp away
    step = (torch.searchsorted(schedule.alpha_t(times), alpha, right=True) - 1).clamp(0, last)
    return gather_events(position, digit, step, free.shape, times, steps)


def gather_events(
    position: Tensor, digit: Tensor, step: Tensor, shape: tuple[int, ...], times: Tensor, num_steps: int
) -> RevealPlan:
    """Gather sub-tokens that are revealed in the same step into events.

    Args:
        position: (F,) int64.
        digit: (F,) int64.
        step: (F,) int64, the step that reveals each sub-token.
        shape: (L, S).
        times: float64, the noise time of every step.
        num_steps: N.
    """
    length, num_digits = shape
    tokens, inverse = torch.unique(step * length + position, return_inverse=True)
    due = torch.zeros(len(tokens), num_digits, dtype=torch.bool)
    due[inverse, digit] = True
    steps, counts = torch.unique_consecutive(tokens // length, return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return RevealPlan(steps, times[steps], offsets, tokens % length, due, num_steps)


def check_steps(steps: Steps) -> None:
    """Raise ValueError unless ``steps`` is an integer of at least 1 or "exact"."""
    if steps != "exact" and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError("steps must be an integer of at least 1, or 'exact'")
