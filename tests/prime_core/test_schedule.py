import pytest
import torch

from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule

SCHEDULES = [
    LinearSchedule(),
    LinearSchedule(1e-3),
    PolynomialSchedule(3),
    PolynomialSchedule(0.5),
    CosineSchedule(),
]
T = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_ends_and_direction(schedule: Schedule) -> None:
    alpha = schedule.alpha_t(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert alpha[0].item() == pytest.approx(1, abs=1e-15)
    assert alpha[1].item() == pytest.approx(getattr(schedule, "eps", 0.0), abs=1e-15)
    assert bool((schedule.alpha_t(T).diff() < 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_derivative_is_the_derivative(schedule: Schedule) -> None:
    h = 1e-6
    slope = (schedule.alpha_t(T + h) - schedule.alpha_t(T - h)) / (2 * h)
    assert torch.allclose(schedule.d_alpha_t(T), slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_inverse_inverts(schedule: Schedule) -> None:
    assert torch.allclose(schedule.inverse(schedule.alpha_t(T)), T, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_weight_is_the_log_derivative_of_the_masked_share(schedule: Schedule) -> None:
    t = T.clone().requires_grad_()
    torch.log(1 - schedule.alpha_t(t)).sum().backward()
    assert t.grad is not None
    assert torch.allclose(schedule.weight(T), t.grad, rtol=1e-10)


def test_published_text_schedule() -> None:
    assert LinearSchedule(1e-3).alpha_t(torch.tensor(0.5, dtype=torch.float64)).item() == pytest.approx(
        1 - 0.999 / 2
    )
    assert LinearSchedule(1e-3).weight(torch.tensor(0.25, dtype=torch.float64)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_inverse_beyond_the_ends_is_an_end(schedule: Schedule) -> None:
    """Rounding may leave a share an ulp outside."""
    t = schedule.inverse(torch.tensor([-1e-9, 1 + 1e-9], dtype=torch.float64))
    assert t.tolist() == pytest.approx([1, 0], abs=1e-12)


def test_inverse_below_the_final_alpha_is_one() -> None:
    assert LinearSchedule(1e-3).inverse(torch.tensor(5e-4)) == 1


def test_grid() -> None:
    grid = CosineSchedule().time_grid(4, eps=0.2)
    assert grid.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    for num_steps, eps in [(0, 0.0), (4, 1.0), (4, -0.1)]:
        with pytest.raises(ValueError, match="must be"):
            CosineSchedule().time_grid(num_steps, eps)


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_power(power: float) -> None:
    with pytest.raises(ValueError, match="power"):
        PolynomialSchedule(power)


@pytest.mark.parametrize("eps", [1.0, -1e-3, float("nan")])
def test_bad_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        LinearSchedule(eps)
