"""The reveal plan: when every free sub-token of a row is revealed, drawn before the network is first called.

In ancestral sampling on a grid 1 = t_0 > ... > t_N = eps a masked sub-token is revealed in step k, from t =
t_k to s = t_{k+1}, with probability (alpha_s - alpha_t) / (1 - alpha_t) (MDLM, arXiv 2406.07524, eq. 7). That
depends on no value, so the step can be drawn first (DNDM, arXiv 2312.09193): a sub-token that is masked at t
= 1 is revealed in step k with probability (alpha_{t_{k+1}} - alpha_{t_k}) / (1 - alpha_1). Steps without a
reveal do not exist.

A corrector (`prime_core.sampling.correctors`) also masks visible sub-tokens again, with probabilities that depend on
no value either. So the plan then holds the whole history of every sub-token (`prime_core.sampling.histories`):
revealed, masked again, revealed anew. What a step masks is visible to that step's call, and masked from the next one
on; steps that only mask are not calls.

Shapes: L tokens, S digits a token, E events, P positions of one event, T positions of all events, F free
sub-tokens, Q sub-tokens masked again before one event, M before all events, N steps of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.noise import Purpose, uniform
from prime_core.sampling.correctors import Corrector, step_tables
from prime_core.sampling.curves import TimeWarp
from prime_core.sampling.histories import Transitions, draw_histories
from prime_core.sampling.time_grid import Steps, check_no_grid, check_steps, grid_times
from prime_core.schedule import Schedule


class Event(NamedTuple):
    """One denoiser call of a row: what it reveals.

    Its arrays are numpy's: a step of the sampler takes and joins many small ones, which costs a tenth there.

    Attributes:
        step: index of the grid step; ``num_steps`` for the leftovers at the end of the grid.
        t: noise time at which the denoiser is evaluated.
        positions: (P,) int64, the tokens that change, ascending.
        due: (P, S) bool, their digits that are revealed; at least one each.
        remasked: (Q,) int64 flat indices position S + digit, ascending: the visible digits that are masked before the
            call, because a step since the previous event's masked them.
    """

    step: int
    t: float
    positions: NDArray[np.int64]
    due: NDArray[np.bool_]
    remasked: NDArray[np.int64]


class _Views(NamedTuple):
    """The tensors of a plan, without a copy, as what costs no tensor operation to read."""

    steps: Sequence[int]
    times: Sequence[float]
    offsets: Sequence[int]
    remask_offsets: Sequence[int]
    positions: NDArray[np.int64]
    due: NDArray[np.bool_]
    remasked: NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class RevealPlan:
    """The events of one row in order, in flat tensors: a row of "exact" steps has thousands of events.

    Attributes:
        steps: (E,) int64, the grid step of every event, ascending.
        times: (E,) float64, the noise time of every event.
        offsets: (E + 1,) int64; event e holds ``offsets[e]:offsets[e + 1]`` of ``positions`` and ``due``.
        positions: (T,) int64, the tokens of all events, event by event.
        due: (T, S) bool, their digits that are revealed.
        num_steps: number of steps of the grid; for "exact" steps that of the events.
        remask_offsets: (E + 1,) int64; event e holds ``remask_offsets[e]:remask_offsets[e + 1]`` of ``remasked``.
        remasked: (M,) int64, what is masked again before each event, see `Event`.
    """

    steps: Tensor
    times: Tensor
    offsets: Tensor
    positions: Tensor
    due: Tensor
    num_steps: int
    remask_offsets: Tensor
    remasked: Tensor
    _views: _Views = field(init=False, repr=False)

    def __post_init__(self) -> None:
        steps, times, offsets, remask_offsets = (
            part.numpy().data for part in (self.steps, self.times, self.offsets, self.remask_offsets)
        )
        positions, due, remasked = (part.numpy() for part in (self.positions, self.due, self.remasked))
        views = _Views(steps, times, offsets, remask_offsets, positions, due, remasked)
        object.__setattr__(self, "_views", views)

    @property
    def nfe(self) -> int:
        """Denoiser calls of this row: the number of function evaluations."""
        return len(self._views.steps)

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        parts = (self.steps, self.times, self.offsets, self.positions, self.due)
        return sum(part.nbytes for part in (*parts, self.remask_offsets, self.remasked))

    @property
    def steps_skipped(self) -> int:
        """Steps of the grid without a denoiser call.

        nfe + steps_skipped is the number of steps of the grid, or one more where leftovers are revealed at its end: a
        call that is no step. "exact" steps have no grid, and none is skipped.
        """
        return self.num_steps - int((self.steps < self.num_steps).sum())

    @property
    def remasks(self) -> bool:
        """Whether any digit is masked again, so that digits may be drawn more than once."""
        return len(self.remasked) > 0

    @property
    def events(self) -> Iterator[Event]:
        """All events in order, each made when it is asked for."""
        return (self.event(index) for index in range(self.nfe))

    def span(self, index: int) -> tuple[int, int]:
        """Return start and stop of an event's positions in the tensors over all T positions."""
        offsets = self._views.offsets
        return offsets[index], offsets[index + 1]

    def event(self, index: int) -> Event:
        """Return one event; its arrays are views of the plan.

        Args:
            index: 0..nfe-1.

        Raises:
            IndexError: if there is no such event.
        """
        if not 0 <= index < self.nfe:
            raise IndexError(f"index must be in 0..{self.nfe - 1}, got {index}")
        views = self._views
        revealed = slice(views.offsets[index], views.offsets[index + 1])
        masked = slice(views.remask_offsets[index], views.remask_offsets[index + 1])
        return Event(
            views.steps[index],
            views.times[index],
            views.positions[revealed],
            views.due[revealed],
            views.remasked[masked],
        )


def draw_plan(
    free: Tensor,
    schedule: Schedule,
    steps: Steps,
    seed: int,
    eps: float = 0.0,
    *,
    warp: TimeWarp | None = None,
    corrector: Corrector | None = None,
) -> RevealPlan:
    """Draw the reveal plan of a row.

    Each free sub-token has one uniform number u (purpose PLAN, its position, its digit) and is revealed when
    alpha reaches alpha_1 + (1 - alpha_1) u; with a corrector see `draw_histories`.

    Args:
        free: (L, S) bool, the masked sub-tokens. No other one is ever touched.
        schedule: noise schedule.
        steps: number of grid steps N >= 1, or "exact" for N -> infinity: one sub-token an event (the
            first-hitting sampler, arXiv 2409.02908).
        seed: 0..2**64-1.
        eps: end of the grid in [0, 1). What is still masked there is revealed in one more event at t = eps.
        warp: warp of the grid; the leftovers are revealed at its last time.
        corrector: how visible sub-tokens are masked again; None for plain ancestral sampling.

    Raises:
        ValueError: if ``steps``, ``seed`` or ``eps`` is out of range, or ``eps``, ``warp`` or ``corrector`` is given
            for "exact" steps.
    """
    check_steps(steps)
    position, digit = free.nonzero(as_tuple=True)
    if steps == "exact":
        check_no_grid(eps, warp, corrector)
        alpha = _alpha_of_reveal(position, digit, schedule, seed)
        order = alpha.argsort(stable=True)
        step = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return gather_events(position, digit, step, free.shape, schedule.inverse(alpha[order]), len(order))
    times = grid_times(schedule, steps, eps, warp)
    if corrector is not None:
        tables = step_tables(schedule, times, corrector)
        reveals, remasks = draw_histories(position, digit, free.shape[1], tables, seed)
        return gather_events(*reveals, free.shape, times, steps, remasks)
    alpha = _alpha_of_reveal(position, digit, schedule, seed)
    # alpha_0 = 1, but rounding may leave it, or `alpha`, an ulp away.
    last = steps if times[-1] > 0 else steps - 1
    step = (torch.searchsorted(schedule.alpha_t(times), alpha, right=True) - 1).clamp(0, last)
    return gather_events(position, digit, step, free.shape, times, steps)


def expected_changes(
    schedule: Schedule, steps: Steps, *, warp: TimeWarp | None = None, corrector: Corrector | None = None
) -> float:
    """Return how often a sub-token that starts masked changes on average: the size of a plan before it is drawn.

    Each change is a reveal or a remask. With v_k the share that is visible before step k, step k reveals (1 - v_k)
    reveal_k and masks v_k remask_k; what is masked at the end of the grid is revealed there.

    Args:
        schedule: as for `draw_plan`, and so are ``steps``, ``warp`` and ``corrector``.
        steps: see there.
        warp: see there.
        corrector: see there.
    """
    if steps == "exact" or corrector is None:
        return 1.0
    visible = changes = 0.0
    tables = step_tables(schedule, grid_times(schedule, steps, 0.0, warp), corrector)
    for reveal, remask in zip(*(table.tolist() for table in tables), strict=True):
        revealed, masked = (1 - visible) * reveal, visible * remask
        changes += revealed + masked
        visible += revealed - masked
    return changes + (1 - visible)


def gather_events(
    position: Tensor,
    digit: Tensor,
    step: Tensor,
    shape: tuple[int, ...],
    times: Tensor,
    num_steps: int,
    remasks: Transitions | None = None,
) -> RevealPlan:
    """Gather sub-tokens that are revealed in the same step into events.

    Args:
        position: (A,) int64.
        digit: (A,) int64.
        step: (A,) int64, the step of each reveal; a sub-token appears once in a step.
        shape: (L, S).
        times: float64, the noise time of every step.
        num_steps: N.
        remasks: what is masked again, each before its next reveal; None for nothing.
    """
    length, num_digits = shape
    tokens, inverse = torch.unique(step * length + position, return_inverse=True)
    due = torch.zeros(len(tokens), num_digits, dtype=torch.bool)
    due[inverse, digit] = True
    steps, counts = torch.unique_consecutive(tokens // length, return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if remasks is None:
        remask_offsets, remasked = torch.zeros_like(offsets), offsets[:0]
    else:
        # The call of a step sees what the step masks, so it belongs to the first event of a later step.
        event = torch.searchsorted(steps, remasks.step, right=True)
        assert bool((event < len(steps)).all()), "what is masked again is revealed again"
        size = length * num_digits
        flat = (event * size + remasks.position * num_digits + remasks.digit).sort().values
        counts = torch.bincount(flat // size, minlength=len(steps))
        remask_offsets, remasked = torch.cat([counts.new_zeros(1), counts.cumsum(0)]), flat % size
    return RevealPlan(steps, times[steps], offsets, tokens % length, due, num_steps, remask_offsets, remasked)


def _alpha_of_reveal(position: Tensor, digit: Tensor, schedule: Schedule, seed: int) -> Tensor:
    """Return the alpha (F,) at which each sub-token is revealed: uniform between alpha_1 and 1."""
    alpha_final = schedule.alpha_final()
    return alpha_final + (1 - alpha_final) * uniform(seed, position, digit, Purpose.PLAN)
