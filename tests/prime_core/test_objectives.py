"""Worked values and properties of the objectives; see the table of worked values in the module docstrings."""

import math

import pytest
import torch
from torch import Tensor

from kernels.nll import coded_nll, subtoken_nll
from prime_core.codec import SubtokenCodec
from prime_core.corruption import antithetic_times
from prime_core.exact.bounds import exact_objectives
from prime_core.models.denoiser import Denoiser
from prime_core.objectives import Objective, training_loss
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from tests.prime_core.enumeration import all_masks, mask_weights
from tests.prime_core.random_dit import random_dit
from tests.stubs import TableDenoiser


class MarginalDenoiser:
    """The optimal predictor of rows of independent tokens: carry-over turns the marginal into the posterior."""

    linear_head = None

    def __init__(self, probabilities: list[float]) -> None:
        self.logits = torch.tensor(probabilities).double().log()

    def features(
        self,
        y_t: Tensor,
        lengths: object,
        t: object = None,
        positions: Tensor | None = None,
        labels: object = None,
    ) -> Tensor:
        return torch.zeros(len(y_t) if positions is None else len(positions), 1)

    def head(self, features: Tensor) -> Tensor:
        return self.logits.expand(len(features), -1)

    def __call__(self, y_t: Tensor, t: object = None) -> Tensor:
        return self.logits.expand(*y_t.shape[:2], -1)


def expected(probabilities: list[float], codec: SubtokenCodec) -> tuple[float, float, float]:
    """Expectations over one-token data of (coded_loss, nelbo, nll) of the optimal predictor."""
    model = MarginalDenoiser(probabilities)
    totals = [0.0, 0.0, 0.0]
    for token, p in enumerate(probabilities):
        if p:
            for i, value in enumerate(exact_objectives(model, codec, torch.tensor([token]))):
                totals[i] += p * value
    return totals[0], totals[1], totals[2]


def enumerated(model: Denoiser, codec: SubtokenCodec, x_0: Tensor) -> tuple[float, float]:
    """(coded_loss, nelbo) of one row: `subtoken_nll` of every set of masked digits, times its weight."""
    y_t, counts = all_masks(codec, x_0)
    weights = mask_weights(counts, y_t[0].numel())
    with torch.no_grad():
        logits = model(y_t, torch.full((len(y_t),), 0.5)).flatten(0, 1)
    x, y = x_0.repeat(len(y_t)), y_t.flatten(0, 1)
    nll = subtoken_nll(logits, y, x, codec.digits, codec.mask_index)
    assert torch.allclose(coded_nll(logits, y, x, codec.digits, codec.mask_index), nll.coded)
    coded, nelbo = ((part.double().view(len(y_t), -1).sum(1) * weights).sum().item() for part in nll)
    return coded, nelbo


def trained_on(model: Denoiser, codec: SubtokenCodec, x_0: Tensor, objective: Objective) -> float:
    """An objective of one row from `training_loss` alone: every set of masked digits, times its weight."""
    y_t, counts = all_masks(codec, x_0)
    weights = mask_weights(counts, y_t[0].numel())
    uniforms = torch.where(y_t == codec.mask_index, 0.9, 0.1)  # alpha_t = 1/2 masks exactly these
    t = torch.tensor([0.5])
    with torch.no_grad():
        losses = [
            training_loss(
                model, codec, LinearSchedule(), x_0[None], t, u[None], objective=objective, weighted=False
            )
            for u in uniforms
        ]
    return float((torch.stack(losses).double() * weights).sum()) * len(x_0)


def entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p)


WORKED_VALUES = pytest.mark.parametrize(
    ("probabilities", "coded", "nelbo"),
    [([0.5, 0, 0, 0.5], 0.34657, 0.69315), ([0.40, 0.10, 0.15, 0.35], 1.18253, 1.24878)],
)


@WORKED_VALUES
def test_worked_values_of_what_is_trained_and_estimated(
    probabilities: list[float], coded: float, nelbo: float
) -> None:
    codec, model = SubtokenCodec(4, 2), MarginalDenoiser(probabilities)
    totals = torch.zeros(4, dtype=torch.float64)
    for token, p in enumerate(probabilities):
        if p:
            x_0 = torch.tensor([token])
            values = (
                *enumerated(model, codec, x_0),
                trained_on(model, codec, x_0, "coded"),
                trained_on(model, codec, x_0, "nelbo"),
            )
            totals += p * torch.tensor(values, dtype=torch.float64)
    assert totals.tolist() == pytest.approx([coded, nelbo, coded, nelbo], abs=1e-5)


@pytest.mark.parametrize("stub", [False, True])
@pytest.mark.parametrize(("vocab_size", "target_length"), [(4, 1), (5, 2), (7, 3), (11, 2)])
def test_what_is_trained_and_estimated_equals_the_enumeration(
    vocab_size: int, target_length: int, stub: bool
) -> None:
    codec = SubtokenCodec(vocab_size, target_length)
    model = TableDenoiser(codec, seed=3) if stub else random_dit(codec, seed=3)
    x_0 = torch.tensor([1, 3])
    exact = exact_objectives(model, codec, x_0)
    if target_length > 1:
        assert abs(exact.coded_loss / exact.nelbo - 1) > 1e-3
    expected = pytest.approx((exact.coded_loss, exact.nelbo), rel=1e-5)
    assert enumerated(model, codec, x_0) == expected
    assert (trained_on(model, codec, x_0, "coded"), trained_on(model, codec, x_0, "nelbo")) == expected


@WORKED_VALUES
def test_worked_values(probabilities: list[float], coded: float, nelbo: float) -> None:
    values = expected(probabilities, SubtokenCodec(4, 2))
    assert values == pytest.approx((coded, nelbo, entropy(probabilities)), abs=5e-6)
    assert nelbo == pytest.approx(entropy(probabilities), abs=5e-6)


def test_independent_digits_make_the_coded_loss_tight() -> None:
    probabilities = [0.3 * 0.6, 0.3 * 0.4, 0.7 * 0.6, 0.7 * 0.4]
    coded, nelbo, _ = expected(probabilities, SubtokenCodec(4, 2))
    assert coded == pytest.approx(entropy(probabilities), abs=1e-12)
    assert nelbo == pytest.approx(entropy(probabilities), abs=1e-12)


def test_coded_loss_falls_short_by_the_total_correlation() -> None:
    p = [0.40, 0.10, 0.15, 0.35]
    first, second = [p[0] + p[1], p[2] + p[3]], [p[0] + p[2], p[1] + p[3]]
    total_correlation = entropy(first) + entropy(second) - entropy(p)
    coded, _, _ = expected(p, SubtokenCodec(4, 2))
    assert coded == pytest.approx(entropy(p) - total_correlation / 2, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("vocab_size", "target_length"), [(4, 2), (5, 2), (7, 3), (4, 1)])
def test_nelbo_never_falls_below_the_nll_of_a_wrong_predictor(
    vocab_size: int, target_length: int, seed: int
) -> None:
    codec = SubtokenCodec(vocab_size, target_length)
    model = TableDenoiser(codec, seed)
    x_0 = torch.randint(0, vocab_size, (2,), generator=torch.Generator().manual_seed(seed))
    value = exact_objectives(model, codec, x_0)
    assert value.nelbo >= value.nll - 1e-9
    if target_length == 1:
        assert value.coded_loss == pytest.approx(value.nelbo, rel=1e-12)


def test_coded_loss_is_not_a_bound() -> None:
    codec = SubtokenCodec(4, 2)
    value = exact_objectives(MarginalDenoiser([0.5, 1e-300, 1e-300, 0.5]), codec, torch.tensor([0, 3]))
    assert value.coded_loss < value.nll - 0.5


@pytest.mark.parametrize("schedule", [LinearSchedule(), PolynomialSchedule(3), CosineSchedule()], ids=repr)
@pytest.mark.parametrize("objective", ["coded", "nelbo"])
def test_training_loss_is_unbiased(
    objective: Objective, schedule: Schedule, generator: torch.Generator
) -> None:
    codec = SubtokenCodec(5, 2)
    model = random_dit(codec)
    x_0 = torch.tensor([1, 3])
    exact = exact_objectives(model, codec, x_0)
    num_batches, num_rows = 40, 1000
    with torch.no_grad():
        losses = [
            training_loss(
                model,
                codec,
                schedule,
                x_0.expand(num_rows, 2),
                antithetic_times(num_rows, generator, eps=0.0),
                torch.rand(num_rows, 2, 2, generator=generator),
                objective=objective,
            )
            for _ in range(num_batches)
        ]
    estimates = torch.stack(losses).double() * 2
    standard_error = float(estimates.std()) / math.sqrt(num_batches)
    want, other = exact.coded_loss, exact.nelbo
    if objective == "nelbo":
        want, other = other, want
    assert abs(want - other) > 5 * standard_error  # the wrong objective would be noticed
    assert abs(float(estimates.mean()) - want) < 4 * standard_error
