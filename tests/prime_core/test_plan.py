"""Reveal plans: complete, in order, and with the probabilities of ancestral sampling."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from kernels.noise import Purpose, uniform
from prime_core.sampling import plan as plan_module
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TimeWarp
from prime_core.sampling.plan import RevealPlan, draw_plan
from prime_core.sampling.time_grid import Steps
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from tests.chi_square import p_value

SCHEDULES = [
    LinearSchedule(),
    LinearSchedule(1e-3),
    LinearSchedule(0.3),
    PolynomialSchedule(3),
    CosineSchedule(),
]


def step_of(plan: RevealPlan, shape: tuple[int, int]) -> Tensor:
    """(L, S) the step that reveals each digit, -1 for none; each at most once."""
    steps = torch.full(shape, -1)
    for event in plan.events:
        assert bool((steps[event.positions][event.due] == -1).all())
        now = steps[event.positions]
        now[event.due] = event.step
        steps[event.positions] = now
    return steps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000, "exact"])
def test_every_free_digit_is_revealed_once_in_order(schedule: Schedule, steps: Steps) -> None:
    free = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    plan = draw_plan(free, schedule, steps, seed=9)
    assert torch.equal(step_of(plan, (40, 3)) >= 0, free)
    assert all(a.step < b.step and a.t > b.t for a, b in itertools.pairwise(plan.events))
    assert plan.nfe == len(list(plan.events))
    for event in plan.events:
        assert bool((np.diff(event.positions) > 0).all())
        assert bool(event.due.any(-1).all())
        assert 0 < event.t <= 1
    if steps == "exact":
        assert plan.nfe == plan.num_steps == int(free.sum())
    else:
        assert plan.num_steps == steps
        assert plan.nfe <= steps


@pytest.mark.parametrize(
    ("steps", "options", "leftovers"),
    [
        (64, {}, False),
        (64, {"corrector": Corrector("published", 16, 2)}, True),
        (64, {"warp": TimeWarp(1, 1, -0.2)}, True),
        (64, {"eps": 0.3}, True),
        (2000, {"corrector": Corrector("corrected", 4, 1)}, False),
        ("exact", {}, False),
    ],
)
def test_skipped_steps_are_those_of_the_grid_without_a_call(
    steps: Steps, options: dict[str, Any], leftovers: bool
) -> None:
    free = torch.ones(200, 2, dtype=torch.bool)
    plan = draw_plan(free, PolynomialSchedule(3), steps, seed=0, **options)
    called = set(plan.steps.tolist())
    assert (plan.num_steps in called) == leftovers
    assert plan.steps_skipped == sum(step not in called for step in range(plan.num_steps))
    assert plan.nfe + plan.steps_skipped == plan.num_steps + leftovers
    if steps == "exact":
        assert plan.steps_skipped == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_step_k_covers_alpha_from_its_start_to_its_end(schedule: Schedule, eps: float) -> None:
    free = torch.ones(200, 2, dtype=torch.bool)
    steps = step_of(draw_plan(free, schedule, 8, seed=4, eps=eps), (200, 2))
    position, digit = free.nonzero(as_tuple=True)
    u = uniform(4, position, digit, Purpose.PLAN)
    alpha = schedule.alpha_final() + (1 - schedule.alpha_final()) * u
    alphas = schedule.alpha_t(schedule.time_grid(8, eps))
    for a, k in zip(alpha.tolist(), steps.flatten().tolist(), strict=True):
        assert float(alphas[k]) <= a
        assert k == 8 or a < float(alphas[k + 1])
    assert bool((steps == 8).any()) == (eps > 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("u", "step"), [(2.0**-53, 0), (1 - 2.0**-53, 6)])
def test_the_extreme_uniform_numbers_are_revealed_in_the_first_and_the_last_step(
    schedule: Schedule, u: float, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rounding makes of the ends of the grid."""
    numbers = torch.full((4,), u, dtype=torch.float64)
    monkeypatch.setattr(plan_module, "uniform", lambda *arguments: numbers)
    plan = draw_plan(torch.ones(4, 1, dtype=torch.bool), schedule, 7, seed=0)
    assert plan.steps.tolist() == [step]
    assert len(plan.positions) == 4


def test_events_carry_the_time_at_the_start_of_their_step() -> None:
    free = torch.ones(50, 1, dtype=torch.bool)
    plan = draw_plan(free, LinearSchedule(), 4, seed=0, eps=0.1)
    expected = [1.0, 0.775, 0.55, 0.325, 0.1]
    assert [event.t for event in plan.events] == pytest.approx(expected, abs=1e-12)
    assert [event.step for event in plan.events] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_steps_are_drawn_with_the_probabilities_of_ancestral_sampling(schedule: Schedule) -> None:
    num_steps, eps = 5, 0.15
    alphas = schedule.alpha_t(schedule.time_grid(num_steps, eps)).tolist()
    masked, law = 1.0, {}
    for k, (alpha_t, alpha_s) in enumerate(itertools.pairwise(alphas)):
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        law[k] = masked * reveal
        masked *= 1 - reveal
    law[num_steps] = masked
    free = torch.ones(6000, 1, dtype=torch.bool)
    steps = step_of(draw_plan(free, schedule, num_steps, seed=77, eps=eps), (6000, 1))
    assert p_value(steps.flatten().tolist(), law) > 1e-4


def test_exact_times_follow_the_schedule() -> None:
    free = torch.ones(4000, 1, dtype=torch.bool)
    schedule = PolynomialSchedule(3)
    plan = draw_plan(free, schedule, "exact", seed=3)
    times = torch.tensor([event.t for event in plan.events], dtype=torch.float64)
    assert kstest(schedule.alpha_t(times).numpy(), "uniform").pvalue > 1e-4
    assert all(int(event.due.sum()) == 1 for event in plan.events)


def test_exact_order_is_uniform() -> None:
    free = torch.tensor([[True, False, True], [False, True, False]])
    orders = []
    for seed in range(1500):
        plan = draw_plan(free, LinearSchedule(), "exact", seed)
        steps = step_of(plan, (2, 3))
        orders.append(tuple(steps[free].tolist()))
    assert p_value(orders, dict.fromkeys(itertools.permutations(range(3)), 1 / 6)) > 1e-4


def test_a_plan_is_a_function_of_seed_and_place_only() -> None:
    free = torch.ones(30, 2, dtype=torch.bool)
    whole = step_of(draw_plan(free, CosineSchedule(), 50, 8), (30, 2))
    part = free.clone()
    part[::3, 0] = False
    assert torch.equal(step_of(draw_plan(part, CosineSchedule(), 50, 8), (30, 2))[part], whole[part])
    assert not torch.equal(step_of(draw_plan(free, CosineSchedule(), 50, 9), (30, 2)), whole)


def test_a_plan_is_flat_and_makes_its_events_on_demand() -> None:
    free = torch.ones(200, 4, dtype=torch.bool)
    plan = draw_plan(free, LinearSchedule(), "exact", seed=2)
    parts = (plan.steps, plan.times, plan.offsets, plan.positions, plan.due)
    num_bytes = sum(part.untyped_storage().nbytes() for part in parts)
    assert num_bytes < 50 * plan.nfe  # an `Event` with its arrays takes half a kilobyte
    held = [getattr(plan, name) for name in type(plan).__slots__ if name != "_views"]
    assert not any(isinstance(part, tuple | list) for part in held)
    assert all(isinstance(part, memoryview | np.ndarray) for part in plan._views)
    assert np.shares_memory(plan.event(7).positions, plan.positions.numpy())
    for index, event in enumerate(plan.events):
        again = plan.event(index)
        assert (again.step, again.t) == (event.step, event.t)
        assert np.array_equal(again.positions, event.positions)
        assert np.array_equal(again.due, event.due)
    for index in (-1, plan.nfe):
        with pytest.raises(IndexError, match="index must be in"):
            plan.event(index)


@pytest.mark.parametrize("warp", [None, TimeWarp(), TimeWarp(1, 0, 0)])
def test_exact_steps_take_a_warp_that_is_none(warp: TimeWarp | None) -> None:
    free = torch.ones(5, 2, dtype=torch.bool)
    plan = draw_plan(free, LinearSchedule(), "exact", 0, warp=warp)
    assert torch.equal(plan.times, draw_plan(free, LinearSchedule(), "exact", 0).times)


def test_nothing_free_gives_no_event() -> None:
    for steps in (5, "exact"):
        assert draw_plan(torch.zeros(4, 2, dtype=torch.bool), LinearSchedule(), steps, 0).nfe == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"steps": 2.0}, "steps must be"),
        ({"steps": "many"}, "steps must be"),
        ({"seed": -1}, "seed must be"),
        ({"eps": 1.0}, "eps must be"),
        ({"eps": -0.1}, "eps must be"),
        ({"steps": "exact", "eps": 0.1}, "eps must be 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_plan(
            torch.ones(2, 2, dtype=torch.bool), LinearSchedule(), **{"steps": 4, "seed": 0, **arguments}
        )
