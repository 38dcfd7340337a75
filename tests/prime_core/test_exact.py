"""The enumeration itself: known answers by hand, and agreement of its two code paths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.exact.laws import (
    dense_ancestral_law,
    enumerate_states,
    first_hitting_law,
    planned_law,
    sequence_nll,
    total_variation,
)
from prime_core.exact.tokens import token_law
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.settings import SamplingSettings
from prime_core.schedule import LinearSchedule
from tests.stubs import TableDenoiser


class ConstantDenoiser(TableDenoiser):
    """The same logits in every state."""

    def __init__(self, codec: SubtokenCodec, probabilities: list[float]) -> None:
        super().__init__(codec)
        self.logits = torch.tensor(probabilities, dtype=torch.float64).log()

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        return self.logits.expand(*y.shape[:2], -1)


def test_one_step_of_one_token_is_the_token_law() -> None:
    codec = SubtokenCodec(4, 2)
    model = ConstantDenoiser(codec, [0.4, 0.1, 0.15, 0.35])
    canvas = digits_canvas(codec, torch.tensor([[2, 2]]))
    law = dense_ancestral_law(model, codec, LinearSchedule(), torch.tensor([1.0, 0.0]).double(), canvas)
    assert law == pytest.approx({(0,): 0.4, (1,): 0.1, (2,): 0.15, (3,): 0.35}, abs=1e-12)


def test_two_steps_of_correlated_digits_by_hand() -> None:
    """Codes 00 and 11 only: whatever is revealed first fixes the rest, so both orders give one half each."""
    codec = SubtokenCodec(4, 2)
    model = ConstantDenoiser(codec, [0.5, 1e-300, 1e-300, 0.5])
    canvas = digits_canvas(codec, torch.tensor([[2, 2]]))
    law = dense_ancestral_law(model, codec, LinearSchedule(), torch.tensor([1.0, 0.5, 0.0]).double(), canvas)
    assert law[(0,)] == pytest.approx(0.5, abs=1e-12)
    assert law[(3,)] == pytest.approx(0.5, abs=1e-12)


def test_states_are_counted_without_dead_ends() -> None:
    codec = SubtokenCodec(5, 2)  # base 3: codes 0..4 of 0..8, so first digit 2 leads nowhere
    states = enumerate_states(codec, 1)
    assert len(states) == len(set(states))
    assert ((2, 3),) not in states
    assert ((1, 2),) not in states
    assert ((3, 2),) in states
    assert len(enumerate_states(codec, 2)) == len(states) ** 2


def test_token_law_by_hand() -> None:
    codec = SubtokenCodec(4, 1)
    logits = [math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]
    masked = (4,)
    assert token_law(codec, logits, masked, SamplingSettings()) == pytest.approx([0.1, 0.5, 0.15, 0.25])
    assert token_law(codec, logits, masked, SamplingSettings(top_k=2)) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert token_law(codec, logits, masked, SamplingSettings(top_p=0.76)) == pytest.approx(
        [0, 5 / 9, 1.5 / 9, 2.5 / 9]
    )
    assert token_law(codec, logits, masked, SamplingSettings(temperature=0)) == [0, 1, 0, 0]
    squares = [p * p for p in (0.1, 0.5, 0.15, 0.25)]
    expected = [p / sum(squares) for p in squares]
    assert token_law(codec, logits, masked, SamplingSettings(temperature=0.5)) == pytest.approx(expected)
    assert token_law(codec, logits, (2,), SamplingSettings(top_k=1)) == [0, 0, 1, 0]


def test_top_k_before_top_p() -> None:
    codec = SubtokenCodec(4, 1)
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the top two the first has 4/7 > 0.5 of the mass; of all four it has 0.4 < 0.5.
    assert token_law(codec, logits, (4,), SamplingSettings(top_k=2, top_p=0.5)) == [1, 0, 0, 0]


def test_fine_grids_approach_the_first_hitting_law() -> None:
    codec = SubtokenCodec(4, 2)
    model = TableDenoiser(codec, seed=2)
    canvas = digits_canvas(codec, torch.tensor([[2, 2], [1, 2]]))
    limit = first_hitting_law(model, codec, canvas)
    schedule = LinearSchedule()
    distances = [
        total_variation(limit, dense_ancestral_law(model, codec, schedule, schedule.time_grid(n), canvas))
        for n in (1, 8, 64)
    ]
    assert distances[0] > 0.01
    assert distances[1] < distances[0] / 4
    assert distances[2] < distances[1] / 6


def test_laws_sum_to_one_and_give_the_nll() -> None:
    codec = SubtokenCodec(5, 2)
    model = TableDenoiser(codec, seed=1, slope=1.0)
    canvas = digits_canvas(codec, torch.tensor([[3, 3], [1, 3]]))
    grid = LinearSchedule().time_grid(3)
    for law in (
        dense_ancestral_law(model, codec, LinearSchedule(), grid, canvas),
        planned_law(model, codec, LinearSchedule(), grid, canvas),
        first_hitting_law(model, codec, canvas),
    ):
        assert sum(law.values()) == pytest.approx(1, abs=1e-12)
        nlls = [sequence_nll(law, torch.tensor([a, b])) for a in range(5) for b in range(5)]
        assert sum(math.exp(-nll) for nll in nlls) == pytest.approx(1, abs=1e-12)
        assert (
            sequence_nll(law, torch.tensor([0, 0])) == math.inf
        )  # its second token contradicts the known digit


def test_total_variation() -> None:
    assert total_variation({(0,): 0.5, (1,): 0.5}, {(1,): 1.0}) == 0.5
    assert total_variation({(0,): 1.0}, {(0,): 1.0}) == 0
