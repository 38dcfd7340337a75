"""Plans in which digits are masked again: their law, their order, their numbers, and what they never touch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prime_core.exact.histories import digit_histories
from prime_core.sampling.correctors import Corrector, StepTables, step_tables
from prime_core.sampling.curves import TimeWarp
from prime_core.sampling.histories import draw_histories
from prime_core.sampling.plan import RevealPlan, draw_plan, expected_changes
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from tests.chi_square import p_value

SCHEDULE = PolynomialSchedule(3)
STRONG = Corrector("corrected", 30, 1.0, 0.5)
PUBLISHED = Corrector("published", 16, 2.0)
WARP = TimeWarp(1, 1.7, 0)


def visible_in_the_end(plan: RevealPlan, shape: tuple[int, int]) -> Tensor:
    """(L S,) bool: what is visible in the end.

    Follows the plan as the stepper does, and checks on the way that only masked digits are revealed and only visible
    ones are masked.
    """
    visible = torch.zeros(shape, dtype=torch.bool)
    for event in plan.events:
        flat = visible.view(-1)
        assert bool(flat[event.remasked].all())
        assert bool((np.diff(event.remasked) > 0).all())
        flat[event.remasked] = False
        now = visible[event.positions]
        assert not bool(now[event.due].any())
        now[event.due] = True
        visible[event.positions] = now
    return visible.flatten()


@pytest.mark.parametrize("corrector", [STRONG, PUBLISHED], ids=str)
@pytest.mark.parametrize("schedule", [SCHEDULE, CosineSchedule(), LinearSchedule(0.3)], ids=str)
@pytest.mark.parametrize(("steps", "eps", "warp"), [(1, 0.0, None), (40, 0.0, WARP), (400, 0.2, None)])
def test_every_free_digit_ends_visible_and_no_other_is_touched(
    corrector: Corrector, schedule: Schedule, steps: int, eps: float, warp: TimeWarp | None
) -> None:
    free = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    plan = draw_plan(free, schedule, steps, 9, eps, warp=warp, corrector=corrector)
    assert torch.equal(visible_in_the_end(plan, (40, 3)), free.flatten())
    assert bool(free.flatten()[plan.remasked].all())
    assert plan.remasks == (len(plan.remasked) > 0) == (steps > 1)
    assert all(a.step < b.step and a.t > b.t for a, b in itertools.pairwise(plan.events))
    assert plan.nfe <= steps + 1
    assert len(plan.remask_offsets) == plan.nfe + 1
    assert plan.remask_offsets[-1] == len(plan.remasked)


def test_events_are_the_steps_with_a_reveal_and_the_rest_are_saved() -> None:
    """Two digits, each revealed once, masked again and revealed: of 512 steps at most four are calls."""
    free = torch.ones(1, 2, dtype=torch.bool)
    plans = [draw_plan(free, SCHEDULE, 512, seed, corrector=STRONG) for seed in range(20)]
    for plan in plans:
        num_reveals = int(plan.due.sum())
        assert num_reveals == 2 + len(plan.remasked)
        assert plan.nfe == len({event.step for event in plan.events}) <= num_reveals
    assert sum(plan.nfe for plan in plans) < 20 * 512 / 20  # calls that a dense sampler would make
    assert max(len(plan.remasked) for plan in plans) >= 4


@pytest.mark.parametrize("corrector", [STRONG, PUBLISHED], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_histories_are_drawn_with_the_law_of_the_chain(corrector: Corrector, eps: float) -> None:
    tables = step_tables(SCHEDULE, WARP.apply(SCHEDULE.time_grid(5, eps)), corrector)
    law = {history.steps: history.probability for history in digit_histories(tables)}
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    _chi_square_of_histories(tables, law)


@pytest.mark.parametrize("corrector", [None, STRONG, PUBLISHED, Corrector("corrected", 100, 0.0)], ids=str)
@pytest.mark.parametrize("warp", [None, WARP, TimeWarp(1, 1, -0.2)], ids=str)
def test_the_expected_changes_are_those_of_all_histories(
    corrector: Corrector | None, warp: TimeWarp | None
) -> None:
    """By enumeration, and the drawn plans agree."""
    times = SCHEDULE.time_grid(7)
    tables = step_tables(SCHEDULE, times if warp is None else warp.apply(times), corrector)
    expected = sum(history.probability * len(history.steps) for history in digit_histories(tables))
    found = expected_changes(SCHEDULE, 7, warp=warp, corrector=corrector)
    assert found == pytest.approx(expected, abs=1e-12)
    plan = draw_plan(torch.ones(4000, 2, dtype=torch.bool), SCHEDULE, 7, 5, warp=warp, corrector=corrector)
    drawn = int(plan.due.sum()) + len(plan.remasked)
    assert drawn / 8000 == pytest.approx(expected, rel=0.03)
    assert (
        expected_changes(SCHEDULE, "exact") == expected_changes(SCHEDULE, "exact", corrector=corrector) == 1
    )


def test_tables_with_certain_and_impossible_moves_are_followed_exactly() -> None:
    reveal = torch.tensor([0.0, 1.0, 0.0, 0.5, 1e-9, 1.0]).double()
    remask = torch.tensor([0.3, 0.0, 1.0, 0.0, 1.0, 0.5]).double()
    tables = StepTables(reveal, remask)
    law = {history.steps: history.probability for history in digit_histories(tables)}
    # Revealed in step 1, masked in 2, then in 3 a fair coin; a digit that is visible in 4 is masked there.
    assert law[(1, 2, 3, 4, 5)] == pytest.approx(0.5)
    assert law[(1, 2, 5)] == pytest.approx(0.5)
    _chi_square_of_histories(tables, law)


def _chi_square_of_histories(tables: StepTables, law: dict[tuple[int, ...], float]) -> None:
    num_draws = 4000
    position, digit = torch.arange(num_draws) // 2, torch.arange(num_draws) % 2
    reveals, remasks = draw_histories(position, digit, 2, tables, seed=12)
    drawn: list[list[int]] = [[] for _ in range(num_draws)]
    for transitions in (reveals, remasks):
        for p, d, step in zip(*(part.tolist() for part in transitions), strict=True):
            drawn[2 * p + d].append(step)
    histories = [tuple(sorted(steps)) for steps in drawn]
    assert p_value(histories, law) > 1e-4


@pytest.mark.parametrize("corrector", [STRONG, PUBLISHED], ids=str)
def test_the_visible_share_follows_the_tables(corrector: Corrector) -> None:
    """By simulation: under "corrected" the share is alpha at every time; "published" is left to its tables."""
    size, num_steps = 10_000, 12
    times = WARP.apply(SCHEDULE.time_grid(num_steps))
    tables = step_tables(SCHEDULE, times, corrector)
    expected = [0.0]
    for reveal, remask in zip(*(table.tolist() for table in tables), strict=True):
        expected.append(expected[-1] * (1 - remask) + (1 - expected[-1]) * reveal)
    if corrector.kind == "corrected":
        assert expected == pytest.approx(SCHEDULE.visible_share(times).tolist(), abs=1e-12)
    position, digit = torch.arange(size), torch.zeros(size, dtype=torch.int64)
    reveals, remasks = draw_histories(position, digit, 1, tables, seed=3)
    for step in range(num_steps + 1):
        seen = int((reveals.step < step).sum() - (remasks.step < step).sum()) / size
        assert abs(seen - expected[step]) < 5 * (0.25 / size) ** 0.5


@pytest.mark.parametrize("kind", ["corrected", "published"])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_a_corrector_without_strength_gives_the_plan_without_corrector(kind: Any, eps: float) -> None:
    free = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) < 0.8
    plain = draw_plan(free, SCHEDULE, 50, 4, eps, warp=WARP)
    weak = draw_plan(free, SCHEDULE, 50, 4, eps, warp=WARP, corrector=Corrector(kind, 0, 1))
    assert not weak.remasks
    for name in ("steps", "times", "offsets", "positions", "due", "remask_offsets"):
        assert torch.equal(getattr(plain, name), getattr(weak, name)), name


def test_a_history_is_a_function_of_seed_and_place_only() -> None:
    free = torch.ones(30, 2, dtype=torch.bool)
    part = free.clone()
    part[::3, 0] = False

    def reveals(free: Tensor, seed: int) -> set[tuple[int, int, int]]:
        plan = draw_plan(free, SCHEDULE, 60, seed, corrector=PUBLISHED)
        assert plan.remasks
        return {
            (event.step, int(event.positions[row]), int(digit))
            for event in plan.events
            for row, digit in zip(*event.due.nonzero(), strict=True)
        }

    kept = {(step, p, digit) for step, p, digit in reveals(free, 8) if part[p, digit]}
    assert reveals(part, 8) == kept
    assert reveals(free, 9) != reveals(free, 8)


def test_a_warp_moves_the_times_and_keeps_the_leftovers() -> None:
    free = torch.ones(300, 1, dtype=torch.bool)
    plan = draw_plan(free, LinearSchedule(), 4, 0, warp=TimeWarp(0.8, 1.0, -0.1))
    assert [event.t for event in plan.events] == pytest.approx([1.0, 0.7, 0.5, 0.3, 0.1])
    counts = [len(event.positions) for event in plan.events]
    assert counts == pytest.approx([90, 60, 60, 60, 30], abs=35)
    early = draw_plan(free, LinearSchedule(), 4, 0, warp=TimeWarp(1.0, 1.0, 0.5))
    assert [event.t for event in early.events] == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warp": WARP}, "warp must be left out when steps is 'exact'"),
        ({"corrector": PUBLISHED}, "corrector must be left out when steps is 'exact'"),
    ],
)
def test_exact_steps_have_no_grid_to_warp_or_correct(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_plan(torch.ones(2, 2, dtype=torch.bool), SCHEDULE, "exact", 0, **arguments)


def test_a_plan_of_a_whole_image_is_small() -> None:
    free = torch.ones(3072, 2, dtype=torch.bool)
    plan = draw_plan(free, SCHEDULE, 512, 0, warp=WARP, corrector=PUBLISHED)
    tensors = [getattr(plan, name) for name in type(plan).__slots__]
    assert sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)) < 2**20
    assert int(plan.due.sum()) == 6144 + len(plan.remasked)
