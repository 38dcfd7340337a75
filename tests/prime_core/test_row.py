"""Rows: what they hold in memory is what they say, since a server admits requests by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prime_core.codec import SubtokenCodec
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TemperatureCurve
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.settings import SamplingSettings
from prime_core.schedule import PolynomialSchedule


def held(row: Row) -> int:
    """Bytes of all arrays of a row; those that repeat one number by a stride of zero hold that number only."""
    plan = row.plan
    parts = [row.y, plan.steps, plan.times, plan.offsets, plan.positions, plan.due]
    arrays = [part.numpy() for part in (*parts, plan.remask_offsets, plan.remasked)]
    arrays += [part for part in row.draws if part is not None]
    return sum(part.nbytes for part in arrays if part.strides != (0,))


@pytest.mark.parametrize("corrector", [None, Corrector("published", 16, 2)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(0.7, 0.9, 5),
        SamplingSettings(TemperatureCurve(-0.2, 2, 1)),
        SamplingSettings(TemperatureCurve(-0.2, 2, 1), draw="marginal"),
    ],
    ids=str,
)
def test_the_memory_of_a_row_is_that_of_its_arrays(
    settings: SamplingSettings, corrector: Corrector | None
) -> None:
    codec = SubtokenCodec(256, 2)
    canvas = digits_canvas(codec, torch.full((50, 2), codec.mask_index))
    row = new_row(canvas, PolynomialSchedule(), settings, 20, 1, corrector=corrector)
    assert row.num_bytes == held(row)
    assert (row.plan.remasks, row.plan.num_bytes > 50 * 2) == (corrector is not None, True)


def test_settings_that_are_the_same_at_every_position_take_no_memory_for_each() -> None:
    codec = SubtokenCodec(256, 2)
    canvas = digits_canvas(codec, torch.full((50, 2), codec.mask_index))
    plain, all_set = (
        new_row(canvas, PolynomialSchedule(), settings, 20, 1)
        for settings in (SamplingSettings(), SamplingSettings(0.7, 0.9, 5))
    )
    assert plain.num_bytes == all_set.num_bytes
    assert all(part is None for part in plain.draws[1:])
    assert [np.unique(part).tolist() for part in all_set.draws[1:] if part is not None] == [
        pytest.approx([0.7]),
        [5],
        pytest.approx([0.9]),
    ]
