"""Planned sampling with curves, warps, correctors and digits drawn alone has the law of the dense sampler.

The dense side calls the network in every step and decides digit by digit what is revealed and what is masked. The
planned side is compared with it exactly (all histories of all digits) and in draws of the real stepper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.exact.histories import planned_chain_law
from prime_core.exact.laws import TokenLaw, dense_chain_law, planned_law, total_variation
from prime_core.sampling.canvas import Canvas, digits_canvas
from prime_core.sampling.correctors import Corrector, StepTables, step_tables
from prime_core.sampling.curves import TemperatureCurve, TimeWarp
from prime_core.sampling.row import new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from tests.chi_square import p_value
from tests.stubs import TableDenoiser

M = -1  # a free digit in the cases below
CURVE = SamplingSettings(TemperatureCurve(-0.8, 1.0, 1.2))
ALONE = SamplingSettings(TemperatureCurve(-0.2, 2.0, 1.0), draw="marginal")
CORRECTED = Corrector("corrected", 12, 1.0, 0.5)
PUBLISHED = Corrector("published", 12, 1.0)


class LabelledTables(TableDenoiser):
    """A table of its own for every label."""

    def __init__(self, codec: SubtokenCodec, slope: float, num_labels: int) -> None:
        super().__init__(codec)
        self.of_label = [TableDenoiser(codec, seed=20 + label, slope=slope) for label in range(num_labels)]

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        assert t is not None and positions is not None and labels is not None
        assert len(labels) == len(lengths)
        rows = zip(y_t.split(list(lengths)), t.split(1), labels.tolist(), strict=True)
        logits = [self.of_label[label]._rows(y[None], time)[0] for y, time, label in rows]
        return torch.cat(logits)[positions]


class Case(NamedTuple):
    """A tiny model, what is known, and how it is sampled; everything depends on time."""

    y: list[list[int]]
    corrector: Corrector | None = None
    settings: SamplingSettings = SamplingSettings()
    warp: TimeWarp | None = None
    steps: int = 3
    eps: float = 0.0
    vocab_size: int = 4
    schedule: Schedule = PolynomialSchedule(2)
    label: int | None = None

    def build(self) -> tuple[TableDenoiser, SubtokenCodec, Canvas]:
        codec = SubtokenCodec(self.vocab_size, len(self.y[0]))
        y = torch.tensor(self.y)
        canvas = digits_canvas(codec, y.masked_fill(y == M, codec.mask_index))
        if self.label is not None:
            return LabelledTables(codec, slope=1.0, num_labels=3).of_label[self.label], codec, canvas
        return TableDenoiser(codec, seed=self.vocab_size, slope=1.0), codec, canvas

    def chain(self) -> tuple[Tensor, StepTables]:
        times = self.schedule.time_grid(self.steps, self.eps)
        times = times if self.warp is None else self.warp.apply(times)
        return times, step_tables(self.schedule, times, self.corrector)

    def dense(self) -> TokenLaw:
        model, codec, canvas = self.build()
        return dense_chain_law(model, codec, *self.chain(), canvas, self.settings)

    def planned(self) -> TokenLaw:
        model, codec, canvas = self.build()
        return planned_chain_law(model, codec, *self.chain(), canvas, self.settings)

    def draws(self, num_draws: int) -> list[tuple[int, ...]]:
        model, codec, canvas = self.build()
        if self.label is not None:
            model = LabelledTables(codec, slope=1.0, num_labels=3)
        rows = [
            new_row(
                canvas,
                self.schedule,
                self.settings,
                self.steps,
                seed,
                self.eps,
                label=self.label,
                warp=self.warp,
                corrector=self.corrector,
            )
            for seed in range(num_draws)
        ]
        run_rows(Stepper(model, codec), rows, max_rows=500)
        return [tuple(codec.decode(row.y).tolist()) for row in rows]


WARP = TimeWarp(1.0, 1.7, 0.0)
TWO_TOKENS = [[M, M], [M, M]]
CASES = {
    "temperature curve": Case(TWO_TOKENS, settings=CURVE),
    "curve and warp": Case(TWO_TOKENS, settings=CURVE, warp=WARP, steps=4, schedule=CosineSchedule()),
    "warp with leftovers": Case([[M, M], [1, M]], warp=TimeWarp(0.9, 1.3, -0.1), steps=4),
    "corrected": Case(TWO_TOKENS, CORRECTED),
    "corrected with everything": Case(
        [[M, M], [1, M]], CORRECTED, CURVE, WARP, steps=3, eps=0.2, vocab_size=9
    ),
    "corrected, a code of no token": Case([[M, M], [M, 1]], CORRECTED, vocab_size=7),
    "corrected, alpha_1 above zero": Case([[M, M]], CORRECTED, steps=4, schedule=LinearSchedule(0.2)),
    "published": Case([[M, M], [M, 0]], PUBLISHED, settings=ALONE, warp=WARP, steps=4),
    "published with leftovers": Case([[M, M], [M, 0]], PUBLISHED, settings=ALONE, eps=0.3),
    "published, one digit a token": Case([[M], [M]], PUBLISHED, settings=ALONE, steps=4),
    "marginal draws": Case(TWO_TOKENS, settings=SamplingSettings(top_p=0.8, draw="marginal")),
    "imputation": Case([[1, M], [0, M]], CORRECTED, steps=4, vocab_size=9),
    "in-painting": Case([[1, 0], [M, M], [0, 1]], PUBLISHED, settings=ALONE, steps=4),
    "label": Case([[M, M], [M, 1]], CORRECTED, settings=CURVE, label=2),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_law_is_the_dense_law(name: str) -> None:
    dense = CASES[name].dense()
    assert len(dense) > 2
    assert sum(dense.values()) == pytest.approx(1, abs=1e-12)
    assert total_variation(dense, CASES[name].planned()) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_dense_law(name: str) -> None:
    assert p_value(CASES[name].draws(400), CASES[name].dense()) > 1e-4


@pytest.mark.parametrize("name", ["temperature curve", "curve and warp", "warp with leftovers"])
def test_without_corrector_the_sum_over_reveal_steps_agrees(name: str) -> None:
    case = CASES[name]
    model, codec, canvas = case.build()
    times, _ = case.chain()
    planned = planned_law(model, codec, case.schedule, times, canvas, case.settings)
    assert total_variation(planned, case.dense()) < 1e-12


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("corrected", {"corrector": None}),
        ("corrected", {"corrector": Corrector("published", 12, 1.0)}),
        ("curve and warp", {"warp": None}),
        ("temperature curve", {"settings": SamplingSettings(1.2)}),
        ("published", {"settings": SamplingSettings(TemperatureCurve(-0.2, 2.0, 1.0))}),
        ("label", {"label": 1}),
    ],
)
def test_the_laws_of_other_samplers_differ(name: str, change: dict[str, Any]) -> None:
    """Every part of a case matters, so that its test can fail."""
    case = CASES[name]
    assert total_variation(case.dense(), case._replace(**change).dense()) > 0.01


def test_the_chi_square_test_tells_a_corrector_apart() -> None:
    case = CASES["imputation"]
    assert p_value(case.draws(600), case._replace(corrector=None).dense()) < 1e-4
