"""Frechet distance between two sets of feature vectors, each taken as a Gaussian.

    d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

is the squared 2-Wasserstein distance of the Gaussians. FID is this formula on the features of one particular
network; on any other features it is another number, so what this project computes with its own small classifier
is called `classifier_feature_distance` and is never compared with a FID.

The estimate is biased: it falls to its limit from above as the number of samples n grows, roughly as 1 / n, so
distances are comparable only at equal n, and n is always reported with them. What two sets of real images of
the same size have for a distance is the floor that a perfect sampler would reach.

Shapes: N samples, D features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BIAS_NOTE = "biased upwards at finite n, so compare at equal n and with the floor"


class GaussianFit(NamedTuple):
    """Mean and covariance of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, normalised by n - 1.
        n: number of samples.
    """

    mean: Tensor
    covariance: Tensor
    n: int


def fit_gaussian(features: Tensor) -> GaussianFit:
    """Fit a Gaussian to features.

    Args:
        features: (N, D) floating point, N >= 2, finite.

    Returns:
        The fit, on the CPU.

    Raises:
        ValueError: the shape is wrong, there are fewer than two samples, or a feature is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features must be (samples, features) of at least 2 samples, got {tuple(features.shape)}"
        )
    values = features.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError("features hold NaN or infinity; is the network that made them sound?")
    mean = values.mean(0)
    centred = values - mean
    return GaussianFit(mean, centred.T @ centred / (len(values) - 1), len(values))


def frechet_distance(first: GaussianFit, second: GaussianFit) -> float:
    """Return the squared Frechet distance of two Gaussians, at least 0.

    The trace of (C_1 C_2)^(1/2) is the sum of the square roots of the eigenvalues of R C_2 R with R R = C_1, a
    symmetric matrix: its eigenvalues are real and the singular covariances of few samples need no repair.

    Args:
        first: a fit of D features.
        second: likewise.

    Raises:
        ValueError: the two have different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"the fits have {len(first.mean)} and {len(second.mean)} features; use one network for both"
        )
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ second.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * cross
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))


def compare_features(samples: Tensor, reference: Tensor, heldout: Tensor) -> dict[str, Any]:
    """Return the distance of samples from real images, and the floor that real images themselves have.

    Samples and held-out images are compared with the same reference. The floor is taken at the number of
    samples, or at as many as there are held-out images if they are fewer; then the floor is too high, and both
    counts show it.

    Args:
        samples: (N, D) features of samples.
        reference: (M, D) features of training images, M >= N for a fair comparison.
        heldout: (H, D) features of held-out images.

    Returns:
        The entry `classifier_feature_distance` of a report: value, floor, the counts of each, what to make of
        them, and a remark if the value is below the floor.

    Raises:
        ValueError: the shapes do not fit together, or there are fewer than two of something.
    """
    n = len(samples)
    real = fit_gaussian(reference)
    floor = heldout[:n]
    value, least = frechet_distance(fit_gaussian(samples), real), frechet_distance(fit_gaussian(floor), real)
    # Samples cannot be closer to real images than real images are: what is below the floor is noise.
    remark = {"remark": f"below its own floor: n = {n} is too small to tell"} if value < least else {}
    return {
        **remark,
        "value": value,
        "floor": least,
        "n": n,
        "n_reference": len(reference),
        "n_floor": len(floor),
        "num_features": samples.shape[1],
        "label": f"Frechet distance of our own classifier's features; {BIAS_NOTE}",
    }


def label_agreement(predicted: Tensor, asked: Tensor) -> dict[str, Any]:
    """Return the share of samples whose predicted label is the one that was asked for.

    Args:
        predicted: (N,) int64.
        asked: (N,) int64.

    Returns:
        value, its binomial standard error, n.

    Raises:
        ValueError: the two differ in shape or are empty.
    """
    if predicted.shape != asked.shape or predicted.ndim != 1 or not len(asked):
        raise ValueError(
            f"predicted and asked labels must be equally many, got {tuple(predicted.shape)} and "
            f"{tuple(asked.shape)}"
        )
    n = len(asked)
    share = float((predicted == asked).double().mean())
    return {"value": share, "standard_error": (share * (1 - share) / n) ** 0.5, "n": n}
