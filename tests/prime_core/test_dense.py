"""The dense sampler with a step cache: the law of ancestral sampling, and exactly the evaluations it needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.noise import Purpose, uniform
from prime_core.codec import SubtokenCodec
from prime_core.exact.laws import TokenLaw, dense_ancestral_law
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.dense import DenseSamples, sample_dense
from prime_core.sampling.row import new_row
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.step_cache import StepCache
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from tests.chi_square import p_value
from tests.prime_core.random_dit import random_dit
from tests.stubs import TableDenoiser

M = -1  # a free digit in the cases below

# Digits of a row, steps, end of the grid, settings, schedule.
CASES: dict[str, tuple[list[list[int]], int, float, SamplingSettings, Schedule]] = {
    "plain digits": ([[M], [M], [M]], 3, 0.0, SamplingSettings(), LinearSchedule(1e-3)),
    "two digits": ([[M, M], [M, M]], 3, 0.0, SamplingSettings(), PolynomialSchedule(3)),
    "partial digits": ([[1, M], [M, 0], [M, M]], 3, 0.0, SamplingSettings(), CosineSchedule()),
    "leftovers": ([[M, M], [M, M]], 2, 0.3, SamplingSettings(), LinearSchedule()),
    "all settings": ([[M, M], [M, 1]], 4, 0.0, SamplingSettings(1.5, 0.8, 4), LinearSchedule()),
    "one step": ([[M, M], [M, M]], 1, 0.0, SamplingSettings(), LinearSchedule()),
    "marginal": ([[M, M], [M, M]], 2, 0.1, SamplingSettings(draw="marginal"), LinearSchedule()),
}


def build(name: str) -> tuple[TableDenoiser, SubtokenCodec, Tensor]:
    digits, _, _, settings, _ = CASES[name]
    vocab_size = 9 if settings.draw == "marginal" else 7
    codec = SubtokenCodec(vocab_size, len(digits[0]))
    y = torch.tensor(digits)
    return TableDenoiser(codec, seed=5), codec, y.masked_fill(y == M, codec.mask_index)


def exact_law(name: str, steps: int) -> TokenLaw:
    _, _, eps, settings, schedule = CASES[name]
    model, codec, y = build(name)
    grid = schedule.time_grid(steps, eps)
    return dense_ancestral_law(model, codec, schedule, grid, digits_canvas(codec, y), settings)


def draw(name: str, seeds: list[int]) -> tuple[DenseSamples, TableDenoiser, SubtokenCodec]:
    _, steps, eps, settings, schedule = CASES[name]
    model, codec, y = build(name)
    rows = y.expand(len(seeds), -1, -1)
    return sample_dense(model, codec, schedule, rows, seeds, steps, settings, eps=eps), model, codec


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_law(name: str) -> None:
    samples, _, codec = draw(name, list(range(2000)))
    assert bool(samples.ok.all())
    draws = [tuple(row) for row in codec.decode(samples.y).tolist()]
    assert p_value(draws, exact_law(name, CASES[name][1])) > 1e-4


def test_the_chi_square_test_tells_other_grids_apart() -> None:
    samples, _, codec = draw("two digits", list(range(2000)))
    draws = [tuple(row) for row in codec.decode(samples.y).tolist()]
    assert p_value(draws, exact_law("two digits", 1)) < 1e-4


def test_evaluations_are_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One evaluation a row, and one more for every (row, step) that changes it but for its last: the plan's events."""
    states: list[Tensor] = []
    begin = StepCache.begin

    def watch(cache: StepCache, y: Tensor, wanted: Tensor | None = None) -> Tensor:
        states.append(y.clone())
        return begin(cache, y, wanted)

    monkeypatch.setattr(StepCache, "begin", watch)
    codec = SubtokenCodec(7, 2)
    model, num_rows, length, steps = TableDenoiser(codec), 30, 4, 12
    y = torch.full((num_rows, length, 2), codec.mask_index)
    y[0] = 1  # nothing to sample: never evaluated
    schedule = CosineSchedule()
    samples = sample_dense(model, codec, schedule, y, list(range(num_rows)), steps, SamplingSettings())
    history = torch.stack([*states, samples.y])
    changed = (history.diff(dim=0) != 0).flatten(2).any(2)  # (steps, rows)
    evaluated = num_rows - 1
    finished = int(changed.any(0).sum())
    assert finished == num_rows - 1
    assert samples.row_evaluations == evaluated + int(changed.sum()) - finished
    # A plan has an event for every (row, step) that changes something, so it never makes more calls of a row.
    assert samples.row_evaluations == int(changed.sum())
    assert samples.num_calls == model.calls <= steps
    assert samples.row_evaluations < 0.8 * num_rows * steps  # the cache saves something here
    filled = [sum(lengths) for lengths in model.lengths]
    assert sum(filled) - samples.row_evaluations * length < 16 * model.calls + sum(filled) / 8
    # The plans of the same request have as many events on average: their law is the same.
    canvas = digits_canvas(codec, y[1])
    planned = [new_row(canvas, schedule, SamplingSettings(), steps, seed).plan.nfe for seed in range(300)]
    spread = 5 * torch.tensor(planned).double().std() / math.sqrt(num_rows - 1)
    assert abs(samples.row_evaluations / (num_rows - 1) - sum(planned) / 300) < spread


def test_a_row_does_not_depend_on_its_batch() -> None:
    codec = SubtokenCodec(50, 2)
    network = random_dit(codec)
    y = torch.full((6, 8, 2), codec.mask_index)
    seeds = [3, 2**64 - 1, 17, 4, 0, 9]

    def run(rows: list[int]) -> Tensor:
        given = [seeds[row] for row in rows]
        return sample_dense(network, codec, LinearSchedule(), y[rows], given, 5, SamplingSettings()).y

    together = run(list(range(6)))
    assert torch.equal(run([1]), together[[1]])
    assert torch.equal(run([4, 1, 2]), together[[4, 1, 2]])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(y, torch.full_like(y, codec.mask_index))  # the input is left alone


def test_noise_is_keyed_by_seed_position_step_and_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digit d of step k has number S k + d for being revealed, and S (1 + k) + d for what it becomes."""
    states: list[Tensor] = []
    begin = StepCache.begin

    def watch(cache: StepCache, y: Tensor, wanted: Tensor | None = None) -> Tensor:
        states.append(y.clone())
        return begin(cache, y, wanted)

    monkeypatch.setattr(StepCache, "begin", watch)
    codec, seeds = SubtokenCodec(16, 2), [5, 2**63]
    model, length = TableDenoiser(codec), 10
    y = torch.full((2, length, 2), codec.mask_index)
    samples = sample_dense(model, codec, LinearSchedule(), y, seeds, 3, SamplingSettings())
    position, digit = torch.arange(length)[:, None], torch.arange(2)
    for step, (before, after) in enumerate(itertools.pairwise([*states, samples.y])):
        for row, seed in enumerate(seeds):
            u = uniform(seed, position, 2 * step + digit, Purpose.PLAN)
            due = (before[row] == codec.mask_index) & (u < [1 / 3, 1 / 2, 1, 1][step])
            assert torch.equal(before[row] != after[row], due)
            if step == 0:
                mass = model(before[row : row + 1])[0].double().softmax(-1).cumsum(-1)
                u = uniform(seed, position[:, 0], 2 + due.int().argmax(-1), Purpose.DRAW)
                drawn = codec.encode(torch.searchsorted(mass, u[:, None], right=True)[:, 0])
                assert torch.equal(after[row][due], drawn[due])


class Certain(TableDenoiser):
    """Makes the token whose number is the row's label certain."""

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        assert labels is not None and positions is None
        certain = F.one_hot(labels.repeat_interleave(torch.tensor(lengths)), self.table.shape[1])
        return super().features(y_t, lengths, t) + 100.0 * certain


def test_every_row_has_its_own_label() -> None:
    codec, labels = SubtokenCodec(7, 2), torch.tensor([3, 0, 6, 3, 1])
    y = torch.full((5, 4, 2), codec.mask_index)
    samples = sample_dense(
        Certain(codec), codec, LinearSchedule(), y, range(5), 6, SamplingSettings(), labels=labels
    )
    assert torch.equal(codec.decode(samples.y), labels[:, None].expand(5, 4))


def test_a_row_that_is_not_finite_fails_alone() -> None:
    codec = SubtokenCodec(7, 2)
    model = TableDenoiser(codec)
    y = torch.full((3, 4, 2), codec.mask_index)
    y[:, 0] = torch.tensor(
        [[0, 0], [2, 0], [0, 1]]
    )  # known tokens; the broken network stumbles over the second

    class Broken(TableDenoiser):
        def _rows(self, y: Tensor, t: Tensor) -> Tensor:
            logits = super()._rows(y, t)
            logits[(y[:, 0] == torch.tensor([2, 0])).all(-1)] = torch.nan
            return logits

    def run(denoiser: TableDenoiser) -> DenseSamples:
        return sample_dense(denoiser, codec, LinearSchedule(), y, [1, 2, 3], 4, SamplingSettings())

    good, bad = run(model), run(Broken(codec))
    assert good.ok.tolist() == [True, True, True]
    assert bad.ok.tolist() == [True, False, True]
    assert torch.equal(good.y[[0, 2]], bad.y[[0, 2]])
    assert torch.equal(bad.y[1], y[1])  # it failed in its first step and took no other
    assert bad.row_evaluations < good.row_evaluations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, "one seed a row, got 1 for 2"),
        ({"seeds": [1, 2**64]}, "seed must be"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"eps": 1.0}, "eps must be"),
        ({"settings": SamplingSettings(draw="marginal")}, "draw 'marginal'"),
        ({"denoiser": random_dit(SubtokenCodec(7, 2), time_conditioned=True)}, "time-free"),
    ],
)
def test_arguments_out_of_range(change: dict[str, Any], message: str) -> None:
    codec = SubtokenCodec(7, 2)
    given: dict[str, Any] = {
        "denoiser": TableDenoiser(codec),
        "codec": codec,
        "schedule": LinearSchedule(),
        "y": torch.full((2, 3, 2), codec.mask_index),
        "seeds": [1, 2],
        "num_steps": 3,
        "settings": SamplingSettings(),
    }
    with pytest.raises(ValueError, match=message):
        sample_dense(**(given | change))
