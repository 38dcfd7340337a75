"""Calls that are queued before the ones before them are known: the same samples, and failures that come late."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.sampling import lookahead
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.lookahead import Lookahead
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.schedule import LinearSchedule
from prime_core.scoring.score import ScoreRequest, prepare_scores
from prime_core.scoring.score_row import ScoreRow
from tests.stubs import TableDenoiser, stub_checkpoint

CODEC = SubtokenCodec(50, 3)


@pytest.fixture(params=[1, 2, 5])
def _ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where so many calls wait while the next one is prepared."""
    monkeypatch.setattr(lookahead, "num_queued", lambda device: request.param)


class FailsLate(TableDenoiser):
    """NaN where a row of five tokens has more than half of its digits."""

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        logits = super()._rows(y, t).clone()
        if y.shape[1] == 5:
            late = (y == CODEC.mask_index).flatten(1).sum(1) < 7
            logits[late] = math.nan
        return logits


def rows_of(*lengths: int) -> list[Row]:
    return [
        new_row(
            digits_canvas(CODEC, torch.full((length, 3), CODEC.mask_index)),
            LinearSchedule(),
            SamplingSettings(),
            "exact",
            seed=length,
        )
        for length in lengths
    ]


def run(denoiser: TableDenoiser, rows: list[Row]) -> list[Row]:
    run_rows(Stepper(denoiser, CODEC), rows, max_rows=2)
    return rows


@pytest.mark.usefixtures("_ahead")
def test_samples_are_those_of_calls_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = run(TableDenoiser(CODEC), rows_of(4, 9, 6))
    monkeypatch.setattr(lookahead, "num_queued", lambda device: 0)
    alone = run(TableDenoiser(CODEC), rows_of(4, 9, 6))
    for one, other in zip(ahead, alone, strict=True):
        assert one.done and not one.failed
        assert torch.equal(one.y, other.y)


@pytest.mark.usefixtures("_ahead")
def test_a_row_that_failed_is_as_it_was_whatever_it_took_part_in_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = run(FailsLate(CODEC), rows_of(4, 5, 6))
    monkeypatch.setattr(lookahead, "num_queued", lambda device: 0)
    alone = run(FailsLate(CODEC), rows_of(4, 5, 6))
    sound = run(TableDenoiser(CODEC), rows_of(4, 5, 6))
    assert [row.failed for row in ahead] == [False, True, False]
    for one, other in zip(ahead, alone, strict=True):
        assert torch.equal(one.y, other.y)
        assert one.next_event == other.next_event
    assert 0 < ahead[1].next_event < ahead[1].plan.nfe
    assert torch.equal(ahead[0].y, sound[0].y) and torch.equal(ahead[2].y, sound[2].y)


class NoisyFailure(TableDenoiser):
    """NaN in one call alone: that of two masked digits."""

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        logits = super()._rows(y, t).clone()
        logits[(y == CODEC.mask_index).flatten(1).sum(1) == 2] = math.nan
        return logits


@pytest.mark.usefixtures("_ahead")
def test_a_failure_that_later_calls_do_not_see_is_a_failure() -> None:
    (row,) = run(NoisyFailure(CODEC), rows_of(4))
    assert row.failed and row.remaining == 0
    assert row.next_event == row.plan.nfe - 2
    assert int((row.y == CODEC.mask_index).sum()) == 2


@pytest.mark.usefixtures("_ahead")
def test_scores_are_those_of_calls_one_by_one_and_failures_stop_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(denoiser: TableDenoiser) -> ScoreRow:
        request = ScoreRequest(token_ids=[1, 2, 3, 4, 5], num_samples=8, seed=1, per_token=True)
        (row, *_) = prepare_scores(stub_checkpoint(CODEC, None), request).rows
        run_rows(Stepper(denoiser, CODEC), [row])
        return row

    ahead, failed = scored(TableDenoiser(CODEC)), scored(FailsLate(CODEC))
    monkeypatch.setattr(lookahead, "num_queued", lambda device: 0)
    alone = scored(TableDenoiser(CODEC))
    assert torch.equal(ahead.nats, alone.nats)
    assert ahead.token_nats is not None and alone.token_nats is not None
    assert torch.equal(ahead.token_nats, alone.token_nats)
    assert failed.failed and failed.next_event == scored(FailsLate(CODEC)).next_event < len(failed.nats)


@pytest.mark.usefixtures("_ahead")
def test_a_row_is_in_a_call_until_its_results_are_there() -> None:
    calls, (row, other) = Lookahead(Stepper(TableDenoiser(CODEC), CODEC)), rows_of(2, 3)
    assert row not in calls
    calls.step([row])
    assert row in calls and other not in calls
    calls.finish()
    assert row not in calls and row.next_event == 1


def test_on_a_cpu_no_call_is_queued() -> None:
    calls, rows = Lookahead(Stepper(FailsLate(CODEC), CODEC)), rows_of(5)
    while not rows[0].done:
        calls.step(rows)
        assert rows[0] not in calls
    assert rows[0].failed
    assert lookahead.num_queued(torch.device("cuda", 1)) == 2
