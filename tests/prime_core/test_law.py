"""The planned sampler has the law of dense ancestral sampling: exactly on enumerable models, and in its draws."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch

from prime_core.codec import SubtokenCodec
from prime_core.exact import laws as exact
from prime_core.exact.laws import (
    TokenLaw,
    dense_ancestral_law,
    first_hitting_law,
    plan_law,
    planned_law,
    total_variation,
)
from prime_core.exact.tokens import Digits, reveal_law
from prime_core.sampling.canvas import Canvas, digits_canvas
from prime_core.sampling.plan import draw_plan
from prime_core.sampling.row import new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.sampling.time_grid import Steps
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from tests.chi_square import p_value
from tests.stubs import TableDenoiser

M = -1  # a free digit in the cases below


class Case(NamedTuple):
    """A tiny model, what is known, and how it is sampled."""

    vocab_size: int
    y: list[list[int]]
    steps: int = 3
    eps: float = 0.0
    slope: float = 0.0
    settings: SamplingSettings = SamplingSettings()
    schedule: Schedule = LinearSchedule()
    permuted: bool = False

    def build(self) -> tuple[TableDenoiser, SubtokenCodec, Canvas]:
        generator = torch.Generator().manual_seed(5)
        permutation = torch.randperm(self.vocab_size, generator=generator) if self.permuted else None
        codec = SubtokenCodec(self.vocab_size, len(self.y[0]), permutation)
        y = torch.tensor(self.y)
        canvas = digits_canvas(codec, y.masked_fill(y == M, codec.mask_index))
        return TableDenoiser(codec, seed=self.vocab_size, slope=self.slope), codec, canvas

    def dense(self) -> TokenLaw:
        model, codec, canvas = self.build()
        grid = self.schedule.time_grid(self.steps, self.eps)
        return dense_ancestral_law(model, codec, self.schedule, grid, canvas, self.settings)

    def planned(self) -> TokenLaw:
        model, codec, canvas = self.build()
        grid = self.schedule.time_grid(self.steps, self.eps)
        return planned_law(model, codec, self.schedule, grid, canvas, self.settings)

    def draws(self, num_draws: int, steps: Steps) -> list[tuple[int, ...]]:
        model, codec, canvas = self.build()
        eps = self.eps if steps != "exact" else 0.0
        rows = [new_row(canvas, self.schedule, self.settings, steps, seed, eps) for seed in range(num_draws)]
        run_rows(Stepper(model, codec), rows, max_rows=500)
        return [tuple(codec.decode(row.y).tolist()) for row in rows]


CASES = {
    "plain digits": Case(5, [[M], [M], [M]], schedule=LinearSchedule(1e-3)),
    "two digits": Case(7, [[M, M], [M, M]]),
    "three digits": Case(7, [[M, M, M]], steps=4),
    "three digits, two tokens": Case(7, [[M, M, M], [1, M, M]], steps=2, schedule=PolynomialSchedule(3)),
    "prefix and suffix": Case(7, [[0, 1], [M, M], [M, M], [2, 0]], schedule=CosineSchedule()),
    "partial digits": Case(7, [[1, M], [M, 0], [M, M]]),
    "temperature": Case(7, [[M, M], [M, M]], settings=SamplingSettings(temperature=0.5)),
    "greedy": Case(7, [[M, M], [M, M]], settings=SamplingSettings(temperature=0.0)),
    "top k": Case(7, [[M, M], [M, M]], settings=SamplingSettings(top_k=2)),
    "top p": Case(7, [[M, M], [M, M]], settings=SamplingSettings(top_p=0.7)),
    "all settings": Case(7, [[M, M], [M, 1]], settings=SamplingSettings(1.5, 0.8, 4), slope=1.0),
    "leftovers": Case(7, [[M, M], [M, M]], eps=0.3),
    "time-conditioned": Case(7, [[M, M], [M, M]], slope=2.0, eps=0.1, schedule=CosineSchedule()),
    "permuted": Case(11, [[M, M], [M, M]], permuted=True, steps=2),
    "one step": Case(7, [[M, M], [M, M]], steps=1),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_law_is_the_dense_law(name: str) -> None:
    dense = CASES[name].dense()
    assert sum(dense.values()) == pytest.approx(1, abs=1e-12)
    assert total_variation(dense, CASES[name].planned()) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_dense_law(name: str) -> None:
    case = CASES[name]
    dense = case.dense()
    draws = case.draws(2000, case.steps)
    if len(dense) == 1:
        assert set(draws) == set(dense)
    else:
        assert p_value(draws, dense) > 1e-4


def test_draws_with_exact_steps_follow_the_first_hitting_law() -> None:
    case = CASES["partial digits"]
    model, codec, canvas = case.build()
    assert p_value(case.draws(2000, "exact"), first_hitting_law(model, codec, canvas)) > 1e-4


@pytest.mark.parametrize("steps", [4, "exact"])
def test_drawn_plans_average_to_the_law(steps: Steps) -> None:
    """Plans as `draw_plan` draws them, each run exactly: their mean approaches the law at the Monte-Carlo rate."""
    model, codec, canvas = CASES["partial digits"].build()
    schedule = CosineSchedule()
    if steps == "exact":
        law = first_hitting_law(model, codec, canvas)
    else:
        law = dense_ancestral_law(model, codec, schedule, schedule.time_grid(steps), canvas)
    mean: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for seed in range(300):
        for tokens, probability in plan_law(
            model, codec, draw_plan(canvas.free, schedule, steps, seed), canvas
        ).items():
            mean[tokens] += probability / 300
    assert total_variation(dict(mean), law) < 0.05


def _independent_digits(
    codec: SubtokenCodec,
    logits: list[float],
    digits: Digits,
    due: list[bool],
    settings: SamplingSettings,
    t: float,
) -> dict[Digits, float]:
    """The mutation: every digit that is due has a draw of the token of its own."""
    marginals = []
    for index, old in enumerate(digits):
        alone = [index == other and is_due for other, is_due in enumerate(due)]
        law: defaultdict[int, float] = defaultdict(float)
        for written, probability in _ONE_DRAW(codec, logits, digits, alone, settings, t).items():
            law[written[index]] += probability
        marginals.append(law if due[index] else {old: 1.0})
    return {
        tuple(digit for digit, _ in choice): math.prod(p for _, p in choice)
        for choice in itertools.product(*(law.items() for law in marginals))
    }


_ONE_DRAW = reveal_law


def test_independent_draws_for_the_digits_of_a_token_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        9, [[M, M], [M, M]], steps=2
    )  # 9 = 3 * 3: every pair of digits is a token, so nothing crashes
    dense, draws = case.dense(), case.draws(2000, 2)
    assert p_value(draws, dense) > 1e-4
    monkeypatch.setattr(exact, "reveal_law", _independent_digits)
    mutated = case.planned()
    assert sum(mutated.values()) == pytest.approx(1, abs=1e-12)
    assert total_variation(dense, mutated) > 0.01
    assert p_value(draws, mutated) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        Case(7, [[M, M], [M, M]], steps=1),
        Case(7, [[M, M], [M, M]], settings=SamplingSettings(temperature=0.5)),
    ],
)
def test_the_chi_square_test_tells_other_laws_apart(wrong: Case) -> None:
    assert p_value(CASES["two digits"].draws(2000, 3), wrong.dense()) < 1e-4
