"""Numbers of a score that no text of a sound model reaches, and states of any size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.noise import uniform
from prime_core.codec import SubtokenCodec
from prime_core.schedule import CosineSchedule, LinearSchedule
from prime_core.scoring import score_row
from prime_core.scoring.score import ScoreRequest, prepare_scores, rows_per_input, score
from prime_core.scoring.score_row import draw_states
from prime_core.scoring.scored import Estimate, Score
from tests.chi_square import p_value
from tests.stubs import TableDenoiser, stub_checkpoint


def score_of(nats: float, num_tokens: int) -> Score:
    return Score(
        nelbo=Estimate(nats, None),
        coded_loss=Estimate(nats, None),
        coded_loss_is_bound=False,
        num_tokens=num_tokens,
        num_bytes=None,
        num_dimensions=None,
        label=None,
        seed=0,
        nfe=1,
        per_token=None,
    )


@pytest.mark.parametrize("nats", [1e4, 1e300])
def test_a_perplexity_beyond_every_float_is_a_large_one(nats: float) -> None:
    assert score_of(nats, 2).ppl == math.exp(700)
    assert score_of(2.0, 2).ppl == math.e


@pytest.mark.parametrize(
    ("num_inputs", "num_samples", "most_rows", "rows"),
    [(1, 16, 64, 16), (1, 16, 4, 4), (4, 16, 64, 16), (4, 16, 12, 3), (4, 16, 7, 1), (9, 16, 4, 1)],
)
def test_inputs_share_the_rows_and_each_has_one(
    num_inputs: int, num_samples: int, most_rows: int, rows: int
) -> None:
    assert rows_per_input(num_inputs, num_samples, most_rows) == rows


def test_more_inputs_than_rows_are_scored_one_after_the_other() -> None:
    codec = SubtokenCodec(50, 2)
    checkpoint = stub_checkpoint(codec, TableDenoiser(codec))
    inputs = [[1, 2], [3], [4, 5, 6]]
    few, many = (score(checkpoint, inputs=inputs, num_samples=3, seed=1, max_rows=n) for n in (1, 64))
    assert few == many


def test_states_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (5, 3)
    together = draw_states(shape, 11, CosineSchedule(), 7, num_labels=4)
    for numbers in (1, 4 * 15):
        monkeypatch.setattr(score_row, "_NUMBERS_AT_A_TIME", numbers)
        parts = draw_states(shape, 11, CosineSchedule(), 7, num_labels=4)
        assert all(torch.equal(a, b) for a, b in zip(parts, together, strict=True))


@pytest.mark.parametrize("num_states", [1, 3])
def test_every_number_of_masked_digits_is_as_likely_however_few_states_there_are(num_states: int) -> None:
    states = [draw_states((2, 2), num_states, LinearSchedule(), seed) for seed in range(400)]
    counts = torch.cat([each.masked.sum(1) for each in states])
    assert p_value(counts.tolist(), dict.fromkeys(range(1, 5), 0.25)) > 1e-4


def test_no_two_states_share_a_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def spy(*arguments: Any) -> Tensor:
        drawn.append(uniform(*arguments))
        return drawn[-1]

    monkeypatch.setattr(score_row, "uniform", spy)
    draw_states((5, 3), 11, LinearSchedule(), 7, num_labels=4)
    numbers = torch.cat([each.flatten() for each in drawn])
    assert len(numbers.unique()) == len(numbers) == 11 * (5 * 3 + 2)


def test_the_memory_of_a_row_is_that_of_its_states_and_results() -> None:
    codec = SubtokenCodec(50, 2)
    for per_token, results in ((False, 8 * 2 * 4), (True, 8 * 2 * 4 + 3 * 2 * 8)):
        request = ScoreRequest(token_ids=[1, 2, 3], num_samples=4, per_token=per_token)
        (row,) = prepare_scores(stub_checkpoint(codec, None), request, 1).rows
        assert row.num_bytes == 4 * (6 + 8) + results
