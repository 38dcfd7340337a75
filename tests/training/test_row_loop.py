"""The loop of prime-sample: every output once, when all is known of it, and no plan before its turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.sampling import lookahead
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.prepare import PreparedRows
from prime_core.sampling.request import TextRequest
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.schedule import LinearSchedule
from tests.stubs import TableDenoiser, stub_checkpoint
from training import row_loop

CODEC = SubtokenCodec(50, 3)
LENGTHS = [3, 0, 5, 2, 0, 4]  # nothing is free in two of them


def prepared(index: int) -> PreparedRows:
    y = torch.full((6, 3), CODEC.mask_index)
    y[LENGTHS[index] :] = 0
    canvas = digits_canvas(CODEC, y)
    row = new_row(canvas, LinearSchedule(), SamplingSettings(), "exact", index)
    return PreparedRows((row,), canvas, TextRequest())


def finish_row(checkpoint: Any, prepared: PreparedRows, row: Row) -> Any:
    """In place of the sample, the row that it would be made of."""
    assert row.done
    return row


@pytest.fixture(params=[0, 2], ids=["cpu", "queued"])
def outputs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[tuple[int, Row]]]:
    """Runs the loop, with the calls of a CPU or queued as on a GPU."""
    monkeypatch.setattr(lookahead, "num_queued", lambda device: request.param)
    monkeypatch.setattr(row_loop, "finish_row", finish_row)

    def run(
        denoiser: Any, max_rows: int, on_step: Callable[[Sequence[Row]], None] = len
    ) -> list[tuple[int, Any]]:
        checkpoint = stub_checkpoint(CODEC, denoiser)
        return list(
            row_loop.finished_rows(checkpoint, prepared, range(len(LENGTHS)), max_rows, on_step)  # type: ignore[arg-type]
        )

    return run


@pytest.mark.parametrize("max_rows", [1, 2, 64])
def test_every_output_comes_once_and_is_what_it_is_alone(
    max_rows: int, outputs: Callable[..., list[tuple[int, Row]]]
) -> None:
    got = outputs(TableDenoiser(CODEC), max_rows)
    assert sorted(index for index, _ in got) == list(range(len(LENGTHS)))
    for index, row in got:
        (alone,) = prepared(index).rows
        while not alone.done:
            Stepper(TableDenoiser(CODEC), CODEC).step([alone])
        assert torch.equal(row.y, alone.y)


@pytest.mark.parametrize("max_rows", [1, 2])
def test_a_call_has_rows_that_are_not_done_and_no_more_than_are_allowed(
    max_rows: int, outputs: Callable[..., list[tuple[int, Row]]]
) -> None:
    calls: list[int] = []

    def on_step(rows: Sequence[Row]) -> None:
        assert not any(row.done for row in rows)
        calls.append(len(rows))

    denoiser = TableDenoiser(CODEC)
    outputs(denoiser, max_rows, on_step)
    assert max(calls) == max_rows
    assert sum(calls) == 3 * sum(LENGTHS)
    assert len(calls) == denoiser.calls


class FailsOnce(TableDenoiser):
    """NaN in the call over four masked digits alone."""

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        logits = super()._rows(y, t).clone()
        logits[(y == CODEC.mask_index).flatten(1).sum(1) == 4] = math.nan
        return logits


def test_a_row_that_failed_is_not_taken_for_a_finished_one(
    outputs: Callable[..., list[tuple[int, Row]]],
) -> None:
    got = dict(outputs(FailsOnce(CODEC), 2))
    assert [got[index].failed for index in range(6)] == [True, False, True, True, False, True]
