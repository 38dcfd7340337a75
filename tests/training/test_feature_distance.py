"""The Frechet distance against numpy and closed forms, its floor, and label agreement."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from training.images.feature_distance import (
    GaussianFit,
    compare_features,
    fit_gaussian,
    frechet_distance,
    label_agreement,
)
from training.images.report import samples_table


def _features(n: int, seed: int, dimension: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    return torch.randn(n, dimension, generator=generator, dtype=torch.float64) @ mixing + seed


def test_the_formula_is_that_of_scipy() -> None:
    first, second = _features(40, 1), _features(50, 2)
    a, b = first.numpy(), second.numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    assert frechet_distance(fit_gaussian(first), fit_gaussian(second)) == pytest.approx(expected, rel=1e-9)


def test_diagonal_gaussians_have_the_closed_form() -> None:
    first = GaussianFit(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double(), 9)
    second = GaussianFit(torch.tensor([2.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 0.0])).double(), 9)
    assert frechet_distance(first, second) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 0) ** 2)


def test_it_is_symmetric_zero_with_itself_and_stands_few_samples() -> None:
    few, many = fit_gaussian(_features(3, 1)), fit_gaussian(_features(60, 2))
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-6)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5 * float(few.covariance.trace()))


def test_the_bias_falls_with_n() -> None:
    reference = fit_gaussian(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)))
    draw = torch.Generator().manual_seed(1)

    def mean_distance(n: int) -> float:
        fits = [fit_gaussian(torch.randn(n, 8, generator=draw)) for _ in range(30)]
        return sum(frechet_distance(fit, reference) for fit in fits) / len(fits)

    assert mean_distance(30) > 2 * mean_distance(120) > 4 * mean_distance(480) > 0


def test_the_floor_is_taken_at_the_number_of_samples() -> None:
    reference, heldout = _features(80, 1), _features(70, 1) + 0.1
    samples = _features(20, 2)
    report = compare_features(samples, reference, heldout)
    assert (report["n"], report["n_reference"], report["n_floor"], report["num_features"]) == (20, 80, 20, 6)
    real = fit_gaussian(reference)
    assert report["value"] == frechet_distance(fit_gaussian(samples), real)
    assert report["floor"] == frechet_distance(fit_gaussian(heldout[:20]), real) != report["value"]
    assert "FID" not in report["label"] and "remark" not in report
    assert compare_features(_features(75, 2), reference, heldout)["n_floor"] == 70


def test_a_distance_below_its_floor_is_called_noise() -> None:
    reference = _features(80, 1)
    report = compare_features(reference[:20], reference, _features(70, 1) + 1)
    assert report["value"] < report["floor"]
    assert report["remark"] == "below its own floor: n = 20 is too small to tell"
    table = samples_table({"samples": {}, "notes": [], "classifier_feature_distance": report})
    assert f"({report['remark']})" in table


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 4), "at least 2 samples"),
        (torch.zeros(4), "at least 2 samples"),
        (torch.full((3, 2), torch.nan), "NaN"),
    ],
)
def test_what_has_no_covariance_is_refused(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_gaussian(features)


def test_fits_of_two_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="6 and 5 features"):
        frechet_distance(fit_gaussian(_features(9, 1)), fit_gaussian(_features(9, 1, 5)))


def test_agreement_is_a_share_with_its_error() -> None:
    report = label_agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0]))
    assert report == {"value": 0.75, "standard_error": pytest.approx((0.75 * 0.25 / 4) ** 0.5), "n": 4}
    with pytest.raises(ValueError, match="equally many"):
        label_agreement(torch.tensor([1]), torch.tensor([1, 2]))
