"""The stepper with labels, re-masking, digits drawn alone and features that are no tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.noise import Purpose, uniform
from prime_core.codec import SubtokenCodec
from prime_core.config import CodecConfig, UNetConfig
from prime_core.models.unet import MIN_DENSE_POSITIONS, UNet
from prime_core.sampling import step_parts
from prime_core.sampling import stepper as stepper_module
from prime_core.sampling.canvas import Canvas, digits_canvas
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TemperatureCurve, TimeWarp
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.schedule import PolynomialSchedule
from tests.stubs import TableDenoiser

SCHEDULE = PolynomialSchedule(3)
CORRECTOR = Corrector("corrected", 30, 1.0, 0.5)
ALONE = SamplingSettings(TemperatureCurve(-0.2, 2.0, 1.0), draw="marginal")
CODEC = SubtokenCodec(64, 3)


def free_canvas(codec: SubtokenCodec, length: int) -> Canvas:
    return digits_canvas(codec, torch.full((length, codec.target_length), codec.mask_index))


def corrected_row(seed: int, length: int = 6, settings: SamplingSettings = ALONE, steps: int = 40) -> Row:
    return new_row(free_canvas(CODEC, length), SCHEDULE, settings, steps, seed, corrector=CORRECTOR)


class Labelled(TableDenoiser):
    """Notes the labels of its calls."""

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        assert labels is not None and len(labels) == len(lengths)
        self.labels = labels.tolist()
        return super().features(y_t, lengths, t, positions)


def test_the_stepper_asks_for_fewer_logits_at_a_time_than_a_dense_head_pays_for() -> None:
    assert stepper_module.MAX_LOGIT_ROWS < MIN_DENSE_POSITIONS


def test_labels_reach_the_network_and_rows_that_fill_a_call_have_label_zero() -> None:
    model = Labelled(CODEC)
    rows = [new_row(free_canvas(CODEC, 5), SCHEDULE, ALONE, 4, seed, label=9 - seed) for seed in range(2)]
    Stepper(model, CODEC).step(rows)
    (lengths,) = model.lengths
    assert len(lengths) > 2
    assert model.labels == [9, 8] + [0] * (len(lengths) - 2)


def test_rows_with_and_without_a_label_never_share_a_call() -> None:
    rows = [new_row(free_canvas(CODEC, 5), SCHEDULE, ALONE, 4, 0, label=label) for label in (0, None)]
    with pytest.raises(AssertionError, match="all have a label, or none has"):
        Stepper(Labelled(CODEC), CODEC).step(rows)


def test_results_of_a_corrected_row_tell_the_whole_story() -> None:
    """Masking what a result says was masked, then writing its digits, gives the row after every step."""
    model, row = TableDenoiser(CODEC), corrected_row(1)
    shown, num_masked = row.y.clone(), 0
    while not row.done:
        event = row.event
        (result,) = Stepper(model, CODEC).step([row])
        assert np.array_equal(result.remasked, event.remasked)
        num_masked += len(result.remasked)
        shown.view(-1)[result.remasked] = CODEC.mask_index
        shown[result.positions] = torch.from_numpy(result.digits)
        assert torch.equal(shown, row.y)
    assert num_masked == len(row.plan.remasked) > 10
    assert model.calls == row.plan.nfe <= 40
    assert not bool((row.y == CODEC.mask_index).any())


def test_known_digits_stay_through_a_corrector() -> None:
    canvas = free_canvas(CODEC, 8)
    canvas.y[:, 0] = torch.arange(8) % 4  # the highest digit of every token
    canvas.y[3] = torch.tensor([1, 2, 3])  # and one whole token
    known = canvas.y != CODEC.mask_index
    row = new_row(canvas, SCHEDULE, SamplingSettings(), 60, 3, corrector=CORRECTOR)
    run_rows(Stepper(TableDenoiser(CODEC), CODEC), [row])
    assert row.plan.remasks
    assert torch.equal(row.y[known], canvas.y[known])
    assert not bool((row.y == CODEC.mask_index).any())


@pytest.mark.parametrize("draw", ["joint", "marginal"])
def test_digits_that_are_drawn_again_have_numbers_of_their_own(
    draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "reveal_digits_" if draw == "marginal" else "reveal_tokens_"
    seen: list[Tensor] = []
    real = getattr(step_parts, name)

    def spy(
        logits: Tensor,
        state: Tensor,
        positions: Tensor,
        due: Tensor,
        digits: Any,
        u: Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        seen.append(u)
        return real(logits, state, positions, due, digits, u, *rest, **options)

    monkeypatch.setattr(step_parts, name, spy)
    row = corrected_row(2**63, settings=SamplingSettings(draw=draw))
    used: list[Tensor] = []
    while not row.done:
        event = row.event
        Stepper(TableDenoiser(CODEC), CODEC).step([row])
        positions, digits = torch.tensor(event.positions), torch.tensor(event.due.argmax(-1))
        if draw == "marginal":
            positions, digits = positions[:, None].expand(-1, 3), torch.arange(3).expand(len(positions), 3)
        number = uniform(row.seed, positions, 3 * (1 + event.step) + digits, Purpose.DRAW)
        assert torch.equal(seen.pop(), number)
        used.append(number.flatten())
    everything = torch.cat(used)
    assert len(everything.unique()) == len(everything)


def mixed_rows(settings: Sequence[SamplingSettings]) -> list[Row]:
    return [
        new_row(
            free_canvas(CODEC, 4 + seed),
            SCHEDULE,
            settings[seed % len(settings)],
            5 + 3 * seed,
            seed,
            warp=TimeWarp(1, 1.7, 0) if seed % 2 else None,
            corrector=CORRECTOR if seed % 3 else None,
        )
        for seed in range(6)
    ]


def test_rows_that_draw_in_different_ways_share_calls_and_do_not_feel_each_other() -> None:
    settings = [
        ALONE,
        SamplingSettings(0.8),
        SamplingSettings(0.0, draw="marginal"),
        SamplingSettings(top_k=5),
    ]
    together, alone = mixed_rows(settings), mixed_rows(settings)
    run_rows(Stepper(TableDenoiser(CODEC, slope=1.0), CODEC), together)
    for row in alone:
        run_rows(Stepper(TableDenoiser(CODEC, slope=1.0), CODEC), [row])
    assert all(torch.equal(a.y, b.y) for a, b in zip(together, alone, strict=True))
    joint = mixed_rows([SamplingSettings()])
    run_rows(Stepper(TableDenoiser(CODEC, slope=1.0), CODEC), joint)
    assert not torch.equal(joint[0].y, together[0].y)


class Failing(TableDenoiser):
    """NaN from the second call on."""

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        return super()._rows(y, t) + (math.nan if self.calls > 1 else 0.0)


class Raising(TableDenoiser):
    """Raises in its second call."""

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return super()._rows(y, t)


def row_whose_second_event_masks() -> Row:
    for seed in range(100):
        row = corrected_row(seed, length=40)
        if len(row.plan.event(1).remasked):
            return row
    raise AssertionError("no such row")


def test_a_row_that_fails_is_left_as_it_was_also_where_digits_were_masked() -> None:
    row = row_whose_second_event_masks()
    stepper = Stepper(Failing(CODEC), CODEC)
    stepper.step([row])
    before = row.y.clone()
    (result,) = stepper.step([row])
    assert row.failed and not result.ok
    assert torch.equal(row.y, before)


def test_a_call_that_raises_can_be_made_again() -> None:
    row, sound = row_whose_second_event_masks(), row_whose_second_event_masks()
    stepper = Stepper(Raising(CODEC), CODEC)
    stepper.step([row])
    with pytest.raises(RuntimeError, match="out of memory"):
        stepper.step([row])
    run_rows(stepper, [row])
    run_rows(Stepper(TableDenoiser(CODEC), CODEC), [sound])
    assert torch.equal(row.y, sound.y)


def small_unet(labels: Any = "class") -> tuple[UNet, SubtokenCodec]:
    config = UNetConfig(
        channels=3,
        height=4,
        width=4,
        model_channels=48,
        channel_mult=(2, 2),
        num_res_blocks=1,
        attention_rates=(2,),
        head_channels=32,
        dropout=0.0,
        labels=labels,
        num_labels=3,
    )
    model = UNet(config, CodecConfig(vocab_size=256, target_length=2), SCHEDULE).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model, SubtokenCodec(256, 2)


def test_images_are_the_same_alone_and_among_others_and_heed_their_label() -> None:
    model, codec = small_unet()

    def rows(labels: Sequence[int]) -> list[Row]:
        return [
            new_row(
                free_canvas(codec, 48),
                SCHEDULE,
                ALONE if seed % 2 else SamplingSettings(),
                6 + seed,
                seed,
                label=label,
                corrector=Corrector("published", 16, 2.0),
            )
            for seed, label in enumerate(labels)
        ]

    together, alone, other = rows([2, 0, 1]), rows([2, 0, 1]), rows([1, 1, 1])
    run_rows(Stepper(model, codec), together)
    run_rows(Stepper(model, codec), alone, max_rows=1)
    run_rows(Stepper(model, codec), other)
    assert [row.done and not bool((row.y == 16).any()) for row in together] == [True] * 3
    assert all(torch.equal(a.y, b.y) for a, b in zip(together, alone, strict=True))
    assert [torch.equal(a.y, b.y) for a, b in zip(together, other, strict=True)] == [False, False, True]
