"""What calls take, fitted to calls."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from server.engine.call_cost import CallCost, CallCostFit
from server.engine.stopwatch import CallStopwatch


def fitted(sizes: list[int], seconds: Callable[[int], float]) -> CallCost:
    fit = CallCostFit()
    return [fit.add(size, seconds(size)) for size in sizes][-1]


def test_a_line_is_found() -> None:
    draw = random.Random(0)
    sizes = [draw.choice([10, 200, 640, 8192]) for _ in range(100)]
    cost = fitted(sizes, lambda size: (0.02 + 1e-4 * size) * draw.uniform(0.9, 1.1))
    assert cost == pytest.approx((0.02, 1e-4), rel=0.3)


def test_small_calls_after_large_ones_are_known_for_cheap() -> None:
    cost = fitted([8192] * 100 + [64], lambda size: 1e-3 + 1e-4 * size)
    assert cost.seconds(10, 640) == pytest.approx(10 * 1e-3 + 640e-4, rel=0.2)


def test_calls_of_one_size_tell_what_calls_of_that_size_take() -> None:
    cost = fitted([100] * 5, lambda size: 0.5)
    assert cost.seconds(4, 400) == pytest.approx(2.0)
    assert cost.seconds(4, 200) == pytest.approx(1.0)  # of others they tell nothing: in proportion


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda size: 1 / size, lambda cost: cost.per_token_s == 0 < cost.per_call_s < 0.1),
        (lambda size: size * size, lambda cost: cost.per_call_s == 0 < cost.per_token_s < 1000),
    ],
)
def test_nothing_is_negative(seconds: Callable[[int], float], expected: Callable[[CallCost], bool]) -> None:
    assert expected(fitted([10, 100, 1000] * 20, seconds))


def test_a_change_of_pace_is_followed() -> None:
    pace = 1e-3

    def seconds(size: int) -> float:
        return pace * size

    fit = CallCostFit()
    for _ in range(200):
        fit.add(50, seconds(50))
    pace = 3e-3
    for _ in range(100):
        cost = fit.add(50, seconds(50))
    assert cost.seconds(1, 50) == pytest.approx(seconds(50), rel=0.1)


def test_calls_that_compiled_are_a_guide_only_until_the_next() -> None:
    watch = CallStopwatch()
    begun_s = time.monotonic()
    time.sleep(0.3)
    watch.ended(begun_s, 32)
    watch.end_trials()
    assert watch.cost.seconds(1, 32) == watch.cost.seconds(1, 10**6) >= 0.3
    begun_s = time.monotonic()
    time.sleep(0.001)
    watch.ended(begun_s, 32)
    assert watch.cost.seconds(1, 32) == pytest.approx(watch.last_s) == pytest.approx(watch.seconds_per_call)


def test_a_call_that_raised_counts_for_nothing() -> None:
    watch = CallStopwatch()
    begun_s = time.monotonic()
    time.sleep(0.05)
    watch.raised()
    watch.ended(begun_s, 16)
    assert 0 < watch.seconds_per_call < 0.05


def test_a_call_that_ran_behind_others_is_timed_from_their_end() -> None:
    watch = CallStopwatch()
    begun_s = time.monotonic()
    time.sleep(0.05)
    watch.ended(begun_s, 16)
    assert watch.last_s >= 0.05
    watch.ended(begun_s, 16)
    assert watch.last_s < 0.05
