"""The steps of a row, and the noise times at which they happen: the schedule's grid, warped where that is asked for.

"exact" steps are the limit of ever finer grids (`prime_core.sampling.plan.draw_plan`): they have no grid, so nothing
that acts on one goes with them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prime_core.integers import is_integer
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TimeWarp
from prime_core.schedule import Schedule

Steps = int | Literal["exact"]


def check_steps(steps: Steps) -> None:
    """Raise ValueError unless ``steps`` is an integer of at least 1 or "exact"."""
    if steps != "exact" and not (is_integer(steps) and steps >= 1):
        raise ValueError(f"steps must be an integer of at least 1, or 'exact', got {steps!r}")


def check_no_grid(eps: float, warp: TimeWarp | None, corrector: Corrector | None) -> None:
    """Check that "exact" steps come without what needs a grid.

    Raises:
        ValueError: if ``eps``, ``warp`` or ``corrector`` is given.
    """
    if eps != 0:
        raise ValueError("eps must be 0 when steps is 'exact': there is no grid to end early")
    if warp is not None and not warp.is_identity:
        raise ValueError("warp must be left out when steps is 'exact': there is no grid to warp")
    if corrector is not None:
        raise ValueError("corrector must be left out when steps is 'exact': it acts step by step of a grid")


def grid_times(schedule: Schedule, steps: int, eps: float, warp: TimeWarp | None) -> Tensor:
    """Return the noise times 1 = t_0 > ... > t_N of a grid; a warp may move them.

    Args:
        schedule: noise schedule.
        steps: N, at least 1.
        eps: last time of the grid before it is warped, in [0, 1).
        warp: warp of the grid; None for none.

    Returns:
        (N + 1,) float64.

    Raises:
        ValueError: if ``steps`` or ``eps`` is out of range.
    """
    times = schedule.time_grid(steps, eps)
    return times if warp is None else warp.apply(times)
