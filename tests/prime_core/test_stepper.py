"""The stepper: one call for any rows, no row disturbs another, nothing is called without need."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.noise import Purpose, uniform
from prime_core.codec import SubtokenCodec
from prime_core.config import CodecConfig, DiTConfig
from prime_core.models.denoiser import filled_size
from prime_core.models.dit import DiT
from prime_core.sampling import step_parts
from prime_core.sampling import stepper as stepper_module
from prime_core.sampling.canvas import Canvas, digits_canvas
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.schedule import LinearSchedule
from tests.stubs import TableDenoiser

SCHEDULE = LinearSchedule()


def free_canvas(codec: SubtokenCodec, length: int) -> Canvas:
    return digits_canvas(codec, torch.full((length, codec.target_length), codec.mask_index))


def random_dit(dtype: torch.dtype, *, time_conditioned: bool = False) -> tuple[DiT, SubtokenCodec]:
    generator = torch.Generator().manual_seed(0)
    config = DiTConfig(
        hidden_size=48, num_blocks=2, num_heads=3, cond_dim=16, length=40, time_conditioned=time_conditioned
    )
    model = DiT(config, CodecConfig(vocab_size=300, target_length=3), SCHEDULE).eval()
    for parameter in model.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return model, SubtokenCodec(300, 3)


def mixed_rows(codec: SubtokenCodec) -> list[Row]:
    """Rows of many lengths, grids and settings, some with known tokens."""
    rows = []
    for seed, (length, steps) in enumerate(
        [(1, 1), (40, 8), (3, 9), (16, "exact"), (17, 4), (40, 7), (5, 2), (33, 5)]
    ):
        canvas = free_canvas(codec, length)
        canvas.y[1::3] = codec.encode(torch.full(canvas.y[1::3].shape[:1], 7 * seed))
        settings = SamplingSettings(*[(1.0, 1.0, 0), (0.7, 0.9, 0), (0.0, 1.0, 0), (1.3, 1.0, 20)][seed % 4])
        rows.append(new_row(canvas, SCHEDULE, settings, steps, seed))  # type: ignore[arg-type]
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    model, codec = random_dit(dtype)
    together = mixed_rows(codec)
    run_rows(Stepper(model, codec), together, max_rows=5)
    for alone, other in zip(mixed_rows(codec), together, strict=True):
        run_rows(Stepper(model, codec), [alone])
        assert alone.done
        assert torch.equal(alone.y, other.y)


@pytest.mark.parametrize("time_conditioned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bitwise_the_same_alone_and_among_others(
    dtype: torch.dtype, time_conditioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, codec = random_dit(dtype, time_conditioned=time_conditioned)
    seen: list[Tensor] = []
    real = step_parts.reveal_tokens_

    def spy(logits: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(logits.clone())
        return real(logits, *arguments, **options)

    monkeypatch.setattr(step_parts, "reveal_tokens_", spy)
    Stepper(model, codec).step(mixed_rows(codec))
    together = torch.cat(seen)
    seen.clear()
    for row in sorted(mixed_rows(codec), key=lambda row: row.length):  # as they are laid
        Stepper(model, codec).step([row])
    assert torch.equal(torch.cat(seen), together)


def test_every_row_keeps_its_own_noise_time() -> None:
    model, codec = random_dit(torch.float32, time_conditioned=True)
    together = mixed_rows(codec)
    run_rows(Stepper(model, codec), together)
    for alone, other in zip(mixed_rows(codec), together, strict=True):
        run_rows(Stepper(model, codec), [alone])
        assert torch.equal(alone.y, other.y)


def test_calls_are_the_distinct_reveal_steps() -> None:
    codec = SubtokenCodec(50, 3)
    for steps in (1, 4, 1000, "exact"):
        model = TableDenoiser(codec)
        row = new_row(free_canvas(codec, 6), SCHEDULE, SamplingSettings(), steps, 3)  # type: ignore[arg-type]
        distinct = {event.step for event in row.plan.events}
        run_rows(Stepper(model, codec), [row])
        assert model.calls == len(distinct) == row.plan.nfe
        assert not bool((row.y == codec.mask_index).any())


def test_rows_with_nothing_masked_are_done_and_call_nothing() -> None:
    codec = SubtokenCodec(50, 3)
    model = TableDenoiser(codec)
    row = new_row(digits_canvas(codec, codec.encode(torch.arange(4))), SCHEDULE, SamplingSettings(), 9, 0)
    assert row.done
    run_rows(Stepper(model, codec), [row])
    assert Stepper(model, codec).step([]) == []
    assert model.calls == 0


def test_a_step_writes_only_what_is_due_and_reports_it() -> None:
    codec = SubtokenCodec(50, 3)
    rows = [new_row(free_canvas(codec, length), SCHEDULE, SamplingSettings(), 6, length) for length in (4, 9)]
    before = [row.y.clone() for row in rows]
    events = [row.event for row in rows]
    results = Stepper(TableDenoiser(codec), codec).step(rows)
    for row, y, event, result in zip(rows, before, events, results, strict=True):
        changed = torch.zeros_like(y, dtype=torch.bool)
        changed[event.positions] = torch.from_numpy(event.due)
        assert torch.equal(row.y != y, changed)
        assert result.ok
        assert np.array_equal(result.positions, event.positions)
        assert np.array_equal(result.digits, row.y[event.positions])
        assert (row.next_event, row.remaining) == (1, row.plan.nfe - 1)


def test_noise_is_keyed_by_seed_position_and_lowest_due_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = SubtokenCodec(50, 3)
    seen: list[Tensor] = []
    real = step_parts.reveal_tokens_

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

    monkeypatch.setattr(step_parts, "reveal_tokens_", spy)
    rows = [new_row(free_canvas(codec, 5), SCHEDULE, SamplingSettings(), 3, seed) for seed in (2**63, 8)]
    expected = torch.cat(
        [
            uniform(row.seed, torch.tensor(row.event.positions), torch.tensor(lowest), Purpose.DRAW)
            for row, lowest in zip(rows, [row.event.due.argmax(-1) for row in rows], strict=True)
        ]
    )
    Stepper(TableDenoiser(codec), codec).step(rows)
    assert torch.equal(torch.cat(seen), expected)


def test_small_calls_are_filled_up_and_none_is_longer_than_its_rows() -> None:
    codec = SubtokenCodec(50, 3)
    for lengths in ([1], [3], [7, 5], [15], [16], [40, 2]):
        model = TableDenoiser(codec)
        rows = [new_row(free_canvas(codec, n), SCHEDULE, SamplingSettings(), 1, 0) for n in lengths]
        Stepper(model, codec).step(rows)
        (called,) = model.lengths
        assert called[: len(lengths)] == sorted(lengths)
        assert sum(called) == filled_size(sum(lengths))
        assert max(called) == max(lengths)


def test_rows_of_one_length_lie_side_by_side_whatever_the_order_they_come_in() -> None:
    codec = SubtokenCodec(50, 3)
    model = TableDenoiser(codec)
    rows = [new_row(free_canvas(codec, n), SCHEDULE, SamplingSettings(), 1, n) for n in (9, 4, 9, 7, 4)]
    results = Stepper(model, codec).step(rows)
    (called,) = model.lengths
    assert called[:5] == [4, 4, 7, 9, 9]
    for row, result in zip(rows, results, strict=True):
        assert np.array_equal(result.digits, row.y[result.positions]) and len(result.positions) == row.length


def test_logits_exist_only_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = SubtokenCodec(50, 3)
    whole, parts = (new_row(free_canvas(codec, 60), SCHEDULE, SamplingSettings(), 1, 0) for _ in range(2))
    Stepper(TableDenoiser(codec), codec).step([whole])
    sizes = []

    class Counting(TableDenoiser):
        def head(self, features: Tensor) -> Tensor:
            sizes.append(len(features))
            return features

    monkeypatch.setattr(stepper_module, "MAX_LOGIT_ROWS", 25)
    Stepper(Counting(codec), codec).step([parts])
    assert sizes == [32, 32, 16]
    assert torch.equal(parts.y, whole.y)


class Poisoned(TableDenoiser):
    """NaN wherever a row has exactly four tokens."""

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        logits = super()._rows(y, t).clone()
        if y.shape[1] == 4:
            logits[:, -1, 3] = math.nan
        return logits


def test_a_failing_row_is_marked_and_disturbs_no_other() -> None:
    codec = SubtokenCodec(50, 3)

    def rows() -> list[Row]:
        return [new_row(free_canvas(codec, n), SCHEDULE, SamplingSettings(), 1, n) for n in (17, 4, 9)]

    failing, sound = rows(), rows()
    before = failing[1].y.clone()
    results = Stepper(Poisoned(codec), codec).step(failing)
    Stepper(TableDenoiser(codec), codec).step(sound)
    assert [result.ok for result in results] == [True, False, True]
    assert [row.failed for row in failing] == [False, True, False]
    assert failing[1].done
    assert failing[1].remaining == 0
    assert torch.equal(failing[1].y, before)
    assert torch.equal(failing[0].y, sound[0].y)
    assert torch.equal(failing[2].y, sound[2].y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 100.5}, r"temperature must be a number in \[0, 100\]"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_k": True}, "top_k"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**settings)


def test_products_come_in_few_sizes() -> None:
    """Each size of a product costs memory that is never given back."""
    sizes = {filled_size(n) for n in range(1, 16_385)}
    assert len(sizes) <= 64
    assert all(n <= filled_size(n) <= max(16, n * 9 / 8 + 15) for n in range(1, 16_385))
    assert [filled_size(n) for n in (1, 16, 17, 256, 257, 512, 513, 1024)] == [
        16,
        16,
        32,
        256,
        288,
        512,
        576,
        1024,
    ]
