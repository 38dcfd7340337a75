import pytest
import torch

from prime_core.codec import SubtokenCodec
from prime_core.exact_bounds import exact_grid_nelbo, exact_objectives
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood
from prime_core.schedule import CosineSchedule, LinearSchedule
from tests.prime_core.random_dit import random_dit
from tests.stubs import TableDenoiser

CASES = [(4, 1), (5, 2), (7, 3)]


@pytest.mark.parametrize(("vocab_size", "target_length"), CASES)
def test_estimates_are_unbiased(vocab_size: int, target_length: int, generator: torch.Generator) -> None:
    codec = SubtokenCodec(vocab_size, target_length)
    model = random_dit(codec, seed=1)
    x_0 = torch.tensor([[1, 3], [0, 2]])
    estimate = estimate_likelihood(
        model, codec, LinearSchedule(1e-3), x_0, generator=generator, num_draws=3000
    )
    for row in range(2):
        exact = exact_objectives(model, codec, x_0[row])
        assert estimate.nelbo[row].item() == pytest.approx(exact.nelbo, rel=0.04)
        assert estimate.coded_loss[row].item() == pytest.approx(exact.coded_loss, rel=0.04)


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


def test_fine_grid_approaches_the_continuous_bound() -> None:
    codec = SubtokenCodec(4, 2)
    model = TableDenoiser(codec, seed=5)
    x_0 = torch.tensor([3])
    values = [exact_grid_nelbo(model, codec, LinearSchedule(), x_0, n) for n in (2, 8, 32)]
    limit = exact_objectives(model, codec, x_0).nelbo
    gaps = [abs(value - limit) for value in values]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.05


def test_time_conditioned_models_see_the_time_of_their_masks(generator: torch.Generator) -> None:
    codec = SubtokenCodec(4, 2)
    x_0 = torch.tensor([[1, 3]])
    values = [
        estimate_likelihood(
            TableDenoiser(codec, 1, slope=2.0), codec, schedule, x_0, generator=torch.Generator().manual_seed(0),
            num_draws=500,
        ).nelbo.item()
        for schedule in (LinearSchedule(), CosineSchedule())
    ]  # fmt: skip
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_bad_arguments(generator: torch.Generator) -> None:
    codec = SubtokenCodec(4, 2)
    model = TableDenoiser(codec)
    with pytest.raises(ValueError, match="num_draws"):
        estimate_likelihood(
            model, codec, LinearSchedule(), torch.tensor([[1]]), generator=generator, num_draws=0
        )
    with pytest.raises(ValueError, match="no tokens"):
        estimate_likelihood(
            model, codec, LinearSchedule(), torch.zeros(0, 4, dtype=torch.long), generator=generator
        )
    with pytest.raises(ValueError, match="12"):
        exact_objectives(model, codec, torch.zeros(7, dtype=torch.long))
