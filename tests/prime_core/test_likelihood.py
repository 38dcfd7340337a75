import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from kernels.nll import subtoken_nll
from prime_core import likelihood
from prime_core.codec import SubtokenCodec
from prime_core.exact.bounds import exact_grid_nelbo, exact_objectives
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood, masked_counts
from prime_core.models.denoiser import Denoiser
from prime_core.schedule import CosineSchedule, LinearSchedule, Schedule
from tests.chi_square import p_value
from tests.prime_core.enumeration import all_masks
from tests.prime_core.random_dit import random_dit
from tests.stubs import TableDenoiser

CASES = [(4, 1), (5, 2), (7, 3)]


def mean_and_error(estimates: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard error, row by row, of independent estimates (B,)."""
    values = torch.stack(estimates)
    return values.mean(0).tolist(), (values.std(0) / math.sqrt(len(values))).tolist()


def masked_share(schedule: Schedule, t: float) -> float:
    """How much of what is masked at time 1 is masked at time t."""
    alpha = schedule.alpha_t(torch.tensor([t, 1.0], dtype=torch.float64))
    return float((1 - alpha[0]) / (1 - alpha[1]))


def time_conditioned_nelbo(model: Denoiser, codec: SubtokenCodec, schedule: Schedule, x_0: Tensor) -> float:
    """int_0^1 dv / v E[...] of a row (L,) by Gauss-Legendre quadrature over v and enumeration of the masks."""
    y_t, counts = all_masks(codec, x_0)
    num_digits = y_t[0].numel()
    nodes, node_weights = np.polynomial.legendre.leggauss(20)
    total = 0.0
    for v, weight in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        t = brentq(lambda t, v=v: masked_share(schedule, t) - v, 0.0, 1.0, xtol=1e-14)
        logits = model(y_t, torch.full((len(y_t),), t, dtype=torch.float64)).flatten(0, 1)
        x, y = x_0.repeat(len(y_t)), y_t.flatten(0, 1)
        nll = subtoken_nll(logits, y, x, codec.digits, codec.mask_index).digits
        density = v ** (counts - 1) * (1 - v) ** (num_digits - counts)
        total += weight * float((nll.double().view(len(y_t), -1).sum(1) * density).sum())
    return total


@pytest.mark.parametrize(("vocab_size", "target_length"), CASES)
def test_estimates_are_unbiased(vocab_size: int, target_length: int, generator: torch.Generator) -> None:
    codec = SubtokenCodec(vocab_size, target_length)
    model = random_dit(codec)
    x_0 = torch.tensor([[1, 3], [0, 2]])
    estimates = [
        estimate_likelihood(model, codec, LinearSchedule(1e-3), x_0, generator=generator, num_draws=100)
        for _ in range(30)
    ]
    nelbo, nelbo_error = mean_and_error([estimate.nelbo for estimate in estimates])
    coded, coded_error = mean_and_error([estimate.coded_loss for estimate in estimates])
    for row in range(2):
        exact = exact_objectives(model, codec, x_0[row])
        if target_length > 1:  # one in place of the other would be noticed
            gap = abs(exact.nelbo - exact.coded_loss)
            assert gap > 5 * max(nelbo_error[row], coded_error[row])
        assert abs(nelbo[row] - exact.nelbo) < 4 * nelbo_error[row]
        assert abs(coded[row] - exact.coded_loss) < 4 * coded_error[row]


def test_one_digit_makes_both_equal(generator: torch.Generator) -> None:
    codec = SubtokenCodec(6, 1)
    estimate = estimate_likelihood(
        TableDenoiser(codec),
        codec,
        LinearSchedule(),
        torch.tensor([[1, 5, 0]]),
        generator=generator,
        num_draws=10,
    )
    assert torch.allclose(estimate.nelbo, estimate.coded_loss, rtol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize(("vocab_size", "target_length"), CASES[:2])
def test_grid_estimate_is_unbiased(
    vocab_size: int, target_length: int, eps: float, generator: torch.Generator
) -> None:
    codec, schedule = SubtokenCodec(vocab_size, target_length), CosineSchedule()
    model = random_dit(codec, seed=2, time_conditioned=True)
    x_0 = torch.tensor([[1, 3]])
    exact = exact_grid_nelbo(model, codec, schedule, x_0[0], 3, eps)
    estimate = estimate_grid_nelbo(
        model, codec, schedule, x_0, 3, eps=eps, generator=generator, num_draws=3000
    )
    assert estimate.item() == pytest.approx(exact, rel=0.04)


def test_one_step_bound_is_the_product_of_the_tokens() -> None:
    codec = SubtokenCodec(5, 2)
    model = TableDenoiser(codec, seed=4)
    x_0 = torch.tensor([2, 4])
    masked = torch.full((1, 2, 2), codec.mask_index)
    want = torch.nn.functional.cross_entropy(model(masked)[0], x_0, reduction="sum")
    assert exact_grid_nelbo(model, codec, LinearSchedule(), x_0, 1) == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("schedule", [LinearSchedule(), LinearSchedule(0.4), CosineSchedule()], ids=repr)
def test_every_estimate_of_one_step_is_that_product(schedule: Schedule, generator: torch.Generator) -> None:
    """Also where the forward process leaves a share visible: the sampler starts all masked."""
    codec = SubtokenCodec(5, 2)
    model = TableDenoiser(codec, seed=4)
    x_0 = torch.tensor([[2, 4]])
    want = torch.nn.functional.cross_entropy(
        model(torch.full((1, 2, 2), codec.mask_index))[0], x_0[0], reduction="sum"
    )
    estimate = estimate_grid_nelbo(model, codec, schedule, x_0, 1, generator=generator)
    assert estimate.item() == pytest.approx(want.item(), rel=1e-6)


def test_fine_grid_approaches_the_continuous_bound() -> None:
    codec = SubtokenCodec(4, 2)
    model = TableDenoiser(codec, seed=5)
    x_0 = torch.tensor([3])
    values = [exact_grid_nelbo(model, codec, LinearSchedule(), x_0, n) for n in (2, 8, 32)]
    limit = exact_objectives(model, codec, x_0).nelbo
    gaps = [abs(value - limit) for value in values]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.05


def test_the_quadrature_agrees_with_the_enumeration_without_time() -> None:
    codec, x_0 = SubtokenCodec(4, 2), torch.tensor([1, 3])
    model = TableDenoiser(codec, 1)
    value = time_conditioned_nelbo(model, codec, CosineSchedule(), x_0)
    assert value == pytest.approx(exact_objectives(model, codec, x_0).nelbo, rel=1e-5)


@pytest.mark.parametrize("schedule", [LinearSchedule(1e-3), LinearSchedule(0.5), CosineSchedule()], ids=repr)
def test_time_conditioned_models_see_the_time_of_their_masks(
    schedule: Schedule, generator: torch.Generator
) -> None:
    codec, x_0 = SubtokenCodec(4, 2), torch.tensor([[1, 3]])
    model = TableDenoiser(codec, 1, slope=6.0)
    estimates = [
        estimate_likelihood(model, codec, schedule, x_0, generator=generator, num_draws=200).nelbo
        for _ in range(20)
    ]
    (mean,), (error,) = mean_and_error(estimates)
    exact = time_conditioned_nelbo(model, codec, schedule, x_0[0])
    without_time = exact_objectives(TableDenoiser(codec, 1), codec, x_0[0]).nelbo
    assert abs(exact - without_time) > 20 * error
    assert abs(mean - exact) < 4 * error


def test_numbers_of_masked_digits_are_one_to_all_of_them() -> None:
    levels = torch.tensor([0.0, 0.199, 0.2, 0.999, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert masked_counts(levels, 5).tolist() == [1, 1, 2, 5, 5, 5]  # a stratum may round up to 1


class Counting(TableDenoiser):
    """Counts the masked digits of its calls."""

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        self.counts = [*getattr(self, "counts", ()), int((y_t == self.base).sum())]
        return super().features(y_t, lengths, t, positions, labels)


def test_a_single_draw_masks_every_number_of_digits_as_often(generator: torch.Generator) -> None:
    codec = SubtokenCodec(4, 2)
    model = Counting(codec)
    for _ in range(400):
        estimate_likelihood(model, codec, LinearSchedule(), torch.tensor([[1, 3]]), generator=generator)
    assert p_value(model.counts, dict.fromkeys(range(1, 5), 0.25)) > 1e-4


@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_a_level_that_rounds_up_to_one_is_of_the_last_step_that_reveals(
    eps: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = SubtokenCodec(4, 2)
    highest = torch.ones(50, dtype=torch.float64)
    monkeypatch.setattr(likelihood, "_stratified", lambda num_rows, generator: highest)
    arguments = TableDenoiser(codec), codec, LinearSchedule(1e-3), torch.tensor([[1, 3]]), 4
    value = estimate_grid_nelbo(*arguments, eps=eps, generator=generator, num_draws=50)
    assert 0 < float(value) < 100


def test_bad_arguments(generator: torch.Generator) -> None:
    codec = SubtokenCodec(4, 2)
    model = TableDenoiser(codec)
    with pytest.raises(ValueError, match="num_draws"):
        estimate_likelihood(
            model, codec, LinearSchedule(), torch.tensor([[1]]), generator=generator, num_draws=0
        )
    for batch_rows in (0, -1):
        with pytest.raises(ValueError, match="batch_rows must be at least 1"):
            estimate_likelihood(
                model,
                codec,
                LinearSchedule(),
                torch.tensor([[1]]),
                generator=generator,
                batch_rows=batch_rows,
            )
    with pytest.raises(ValueError, match="no tokens"):
        estimate_likelihood(
            model, codec, LinearSchedule(), torch.zeros(0, 4, dtype=torch.long), generator=generator
        )
    with pytest.raises(ValueError, match="no tokens"):
        estimate_grid_nelbo(
            model, codec, LinearSchedule(), torch.zeros(0, 4, dtype=torch.long), 4, generator=generator
        )
    with pytest.raises(ValueError, match="12"):
        exact_objectives(model, codec, torch.zeros(7, dtype=torch.long))
