"""Correctors: what a step does to the visible share, against closed forms; limits; refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prime_core.sampling.correctors import Corrector, StepTables, step_tables
from prime_core.sampling.curves import TimeWarp
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule

SCHEDULES = [
    LinearSchedule(),
    LinearSchedule(0.3),
    PolynomialSchedule(3),
    PolynomialSchedule(0.5),  # alpha' is infinite at t = 1
    CosineSchedule(),
]
CORRECTED = [
    Corrector("corrected", 16, 2.0, 0.75),
    Corrector("corrected", 100, 0.0),
    Corrector("corrected", 3, 0.0, 2.0),
]
PUBLISHED = Corrector("published", 16, 2.0)


def shares(tables: StepTables) -> Tensor:
    """(N + 1,) the expected visible share at every time of the grid, step by step from 0."""
    share = [0.0]
    for reveal, remask in zip(*(table.tolist() for table in tables), strict=True):
        share.append(share[-1] * (1 - remask) + (1 - share[-1]) * reveal)
    return torch.tensor(share, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("corrector", CORRECTED, ids=str)
@pytest.mark.parametrize(
    ("steps", "eps", "warp"),
    [(1, 0.0, None), (7, 0.0, TimeWarp(1, 1.7, 0)), (40, 0.2, None), (9, 0.0, TimeWarp(2, 1, 0.5))],
)
def test_the_corrected_share_is_the_schedule_at_every_time(
    schedule: Schedule, corrector: Corrector, steps: int, eps: float, warp: TimeWarp | None
) -> None:
    times = schedule.time_grid(steps, eps)
    times = times if warp is None else warp.apply(times)
    tables = step_tables(schedule, times, corrector)
    assert all(bool(((0 <= table) & (table <= 1)).all()) for table in tables)
    alpha, final = schedule.alpha_t(times), schedule.alpha_final()
    assert torch.allclose(shares(tables), (alpha - final) / (1 - final), rtol=0, atol=1e-14)


def test_a_corrector_with_strength_really_masks() -> None:
    times = PolynomialSchedule(3).time_grid(64)
    for corrector in (*CORRECTED, PUBLISHED):
        assert step_tables(PolynomialSchedule(3), times, corrector).remask.max() > 0.02


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("corrector", [None, Corrector("corrected", 0, 1), Corrector("published", 0, 1)])
def test_without_strength_the_tables_are_those_of_ancestral_sampling(
    schedule: Schedule, corrector: Corrector | None
) -> None:
    times = schedule.time_grid(9, 0.1)
    alpha = schedule.alpha_t(times)
    tables = step_tables(schedule, times, corrector)
    assert torch.allclose(tables.reveal, alpha.diff() / (1 - alpha[:-1]), rtol=0, atol=1e-14)
    assert not tables.remask.any()


def test_published_step_by_hand() -> None:
    """Linear schedule, from t = 0.5 to 0.25: kappa = 0.5, kappa' = 1, beta = 8 * 0.5^1 * 0.5^1 = 2."""
    times = torch.tensor([1.0, 0.5, 0.25]).double()
    tables = step_tables(LinearSchedule(), times, Corrector("published", 8, 1))
    rate = 1 - math.exp(-0.25 * 2 / 0.5)
    assert tables.remask.tolist() == pytest.approx([0.0, rate])
    assert tables.reveal.tolist() == pytest.approx([0.5, 1 - (1 - 0.5) * (1 - rate)])


def test_corrected_step_by_hand() -> None:
    times = torch.tensor([1.0, 0.5, 0.25]).double()
    tables = step_tables(LinearSchedule(), times, Corrector("corrected", 2, 1, 0))  # beta = 2 * 0.5 = 1
    sigma = 1 - math.exp(-0.25 * 1 / 0.5)
    assert sigma < 0.5
    assert tables.remask.tolist() == pytest.approx([0.0, sigma])
    assert tables.reveal.tolist() == pytest.approx([0.5, (0.75 - (1 - sigma) * 0.5) / 0.5])
    # So strong that more would be masked than the schedule can take back: the bound (1 - alpha_s) / alpha_t.
    strong = step_tables(LinearSchedule(), times, Corrector("corrected", 100, 1, 0))
    assert strong.remask[1] == pytest.approx(0.5)
    assert strong.reveal[1] == pytest.approx(1.0)


def test_published_uses_the_first_power_twice_and_corrected_its_own() -> None:
    t = torch.tensor([0.3], dtype=torch.float64)
    assert Corrector("published", 2, 3).strength(t).item() == pytest.approx(2 * 0.7**3 * 0.3**3)
    assert Corrector("corrected", 2, 3, 0.5).strength(t).item() == pytest.approx(2 * 0.7**3 * 0.3**0.5)
    assert Corrector("corrected", 2, 3).strength(t).item() == pytest.approx(2 * 0.7**3 * 0.3**3)


def test_published_leaves_the_schedule_by_the_derived_surplus() -> None:
    """The surplus of one step from the schedule, to second order in h, as the module derives it."""
    schedule, corrector, h = PolynomialSchedule(3), PUBLISHED, 1e-4
    for t, sign in ((0.6, 1), (0.5, 1), (0.2, -1), (0.1, -1)):
        times = torch.tensor([t, t - h], dtype=torch.float64)
        tables = step_tables(schedule, times, corrector)
        now, then = schedule.visible_share(times).tolist()
        surplus = now * (1 - tables.remask.item()) + (1 - now) * tables.reveal.item() - then
        beta = 16 * (1 - t) ** 2 * t**2
        growth = 3 * (1 - t) ** 2
        derived = (h * growth) ** 2 * beta * (beta * (1 - 2 * now) - 2 * now) / (2 * now * (1 - now))
        assert surplus == pytest.approx(derived, rel=5e-3)
        assert math.copysign(1, derived) == sign


def test_published_shows_more_than_the_schedule_early_less_late_and_nothing_in_the_limit() -> None:
    schedule = PolynomialSchedule(3)
    extremes = []
    for steps in (64, 128, 256):
        times = schedule.time_grid(steps)
        surplus = shares(step_tables(schedule, times, PUBLISHED)) - schedule.visible_share(times)
        extremes.append((float(surplus.max()), float(surplus.min())))
        assert times[surplus.argmax()] > 0.4 > times[surplus.argmin()]
    for (more, less), (half_more, half_less) in itertools.pairwise(extremes):
        assert more > 1e-4 and less < -1e-4
        assert half_more / more == pytest.approx(0.5, abs=0.1)  # O(h)
        assert half_less / less == pytest.approx(0.5, abs=0.1)


def test_digits_are_masked_again_at_most_scale_times_on_average() -> None:
    """What bounds the size of a plan."""
    for schedule in SCHEDULES:
        for corrector in (Corrector("corrected", 100, 0.0), Corrector("published", 100, 0.0)):
            tables = step_tables(schedule, schedule.time_grid(2000), corrector)
            expected = float((shares(tables)[:-1] * tables.remask).sum())
            assert 50 < expected < 101


def test_the_ends_of_the_ranges_are_accepted() -> None:
    t = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert Corrector("corrected", 100, 0, 100).strength(t).tolist() == pytest.approx(
        [100, 100 * 2.0**-100, 0]
    )
    assert Corrector("published", 0, 100).strength(t).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", 1, 1), "corrector.kind must be 'corrected' or 'published'"),
        (("published", 16, 2.0, 0.75), "final_power has no effect in the published sampler"),
        (("corrected", -1, 1), r"corrector.scale must be in \[0, 100\], got -1"),
        (("corrected", 101, 1), "corrector.scale"),
        (("published", 1, -1), "corrector.power"),
        (("published", 1, 101), r"corrector.power must be in \[0, 100\], got 101"),
        (("corrected", 1, 1, -0.5), "corrector.final_power must be in"),
        (("corrected", 1, 1, 101), r"corrector.final_power must be in \[0, 100\], got 101"),
        (("corrected", math.nan, 1), "corrector.scale must be a finite number"),
        (("published", 1, True), "corrector.power must be a finite number"),
        (("corrected", 1, 1, "1"), "corrector.final_power must be a finite number"),
    ],
)
def test_correctors_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Corrector(*arguments)
