"""Temperature curves and time warps: values by hand, ends, and refusals that name the parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_core.sampling.curves import MAX_TEMPERATURE, TemperatureCurve, TimeWarp
from prime_core.schedule import LinearSchedule

numbers = st.floats(-150, 150)


def grid(num_steps: int, eps: float = 0.0) -> torch.Tensor:
    return LinearSchedule().time_grid(num_steps, eps)


def test_the_published_temperature_falls_from_one_to_four_fifths() -> None:
    curve = TemperatureCurve(-0.2, 2.0, 1.0)
    assert [curve.at(t) for t in (1.0, 0.5, 0.0)] == pytest.approx([1.0, 0.95, 0.8], abs=1e-15)


def test_power_zero_is_a_constant_also_where_all_is_masked() -> None:
    curve = TemperatureCurve(0.3, 0.0, 0.4)
    assert [curve.at(t) for t in (1.0, 0.3, 0.0)] == pytest.approx([0.7] * 3)


@given(scale=numbers, power=st.floats(0, 100), offset=numbers, t=st.floats(0, 1))
def test_an_accepted_temperature_is_in_range_everywhere(
    scale: float, power: float, offset: float, t: float
) -> None:
    try:
        curve = TemperatureCurve(scale, power, offset)
    except ValueError:
        ends = [scale * tau**power + offset for tau in (0.0, 1.0)]
        assert not all(0 <= end <= MAX_TEMPERATURE for end in ends)
    else:
        assert 0 <= curve.at(t) <= MAX_TEMPERATURE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.2, 2.0, 1.0), r"temperature is -0.2 at t = 0.*temperature.scale or temperature.offset"),
        ((0.5, 2.0, -0.1), r"temperature is -0.1 at t = 1"),
        ((60, 1, 60), r"temperature is 120 at t = 0, but must stay in \[0, 100\]"),
        ((1.0, -1.0, 0.0), r"temperature.power must be in \[0, 100\], got -1"),
        ((1.0, 101, 0.0), "temperature.power"),
        ((math.nan, 1.0, 1.0), "temperature.scale must be a finite number"),
        ((1.0, True, 1.0), "temperature.power must be a finite number"),
        ((1.0, 1.0, "1"), "temperature.offset must be a finite number"),
    ],
)
def test_temperatures_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureCurve(*arguments)


@pytest.mark.parametrize("warp", [TimeWarp(), TimeWarp(1, 1, 0), TimeWarp(1, 0, 0)])
def test_the_identity_and_the_published_default_leave_the_grid_alone(warp: TimeWarp) -> None:
    assert warp.is_identity
    assert torch.equal(warp.apply(grid(7, 0.1)), grid(7, 0.1))


def test_the_published_warp_is_a_power_of_the_noise_time() -> None:
    expected = [1.0, 0.75**1.7, 0.5**1.7, 0.25**1.7, 0.0]
    assert TimeWarp(1.0, 1.7, 0.0).apply(grid(4)).tolist() == pytest.approx(expected, abs=1e-15)


def test_in_the_published_clock_the_warp_is_one_minus_a_power_plus_the_offset() -> None:
    warp = TimeWarp(0.9, 1.5, 0.2)
    tau = 1 - grid(10)
    expected = (1 - 0.9 * (1 - tau) ** 1.5 + 0.2).clamp(0, 1)
    assert torch.allclose(1 - warp.apply(grid(10))[1:], expected[1:], atol=1e-15)


def test_a_warped_grid_starts_at_one_and_may_end_early_or_late() -> None:
    early = TimeWarp(0.8, 1.0, -0.1).apply(grid(4))
    assert early.tolist() == pytest.approx([1.0, 0.7, 0.5, 0.3, 0.1])
    assert TimeWarp(1.0, 1.0, 0.5).apply(grid(4)).tolist() == pytest.approx([1.0, 0.25, 0.0, 0.0, 0.0])


@given(scale=numbers, power=numbers, offset=numbers, num_steps=st.integers(1, 40), eps=st.floats(0, 0.9))
def test_an_accepted_warp_gives_a_grid_that_never_goes_back(
    scale: float, power: float, offset: float, num_steps: int, eps: float
) -> None:
    try:
        warp = TimeWarp(scale, power, offset)
    except ValueError:
        return
    times = warp.apply(grid(num_steps, eps))
    assert times[0] == 1
    assert bool((times.diff() <= 0).all())
    assert bool(((times >= 0) & (times <= 1)).all())
    assert bool(times.isfinite().all())


def test_the_ends_of_the_ranges_are_accepted() -> None:
    assert TemperatureCurve(0, 100, 100).at(0.5) == 100
    assert TimeWarp(100, 100, 99).apply(grid(2)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.0, 0.0), "warp.power must be in .*every time the same"),
        ((0.0, 1.0, -0.5), r"warp.scale must be in \(0, 100\], got 0"),
        ((-1.0, 1.0, 0.0), "warp.scale"),
        ((101, 1.0, 0.0), r"warp.scale must be in \(0, 100\], got 101"),
        ((1.0, -1.0, 0.0), "warp.power"),
        ((1.0, 101, 0.0), r"warp.power must be in \(0, 100\], got 101"),
        ((1.0, 1.0, 1.0), r"warp.offset must lie between -1 and warp.scale \(1\), got 1"),
        ((1.0, 1.0, -1.0), "never leave t = 1"),
        ((math.inf, 1.0, 0.0), "warp.scale must be a finite number"),
        ((1.0, True, 0.0), "warp.power must be a finite number"),
    ],
)
def test_warps_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeWarp(*arguments)
