"""How good samples of an image model are: distances from real images, and whether they show their labels.

Shapes: N samples, M training images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prime_core.pictures import Pixels
from training.data.images import ImageSet
from training.images.classifier_net import Classifier
from training.images.draws import ImageDraws, draw_images
from training.images.feature_distance import compare_features, label_agreement
from training.images.inception import Inception, inception_metrics
from training.images.sample_folder import LABELS_NAME, REQUEST_NAME, SAMPLES_NAME
from training.sample_request import SampleFileError, read_request


class Samples(NamedTuple):
    """Samples of a model.

    Attributes:
        pixels: (N, H, W, C) uint8.
        labels: (N,) int64, the labels they were sampled under; None for models without.
        facts: where they are from, for the report.
    """

    pixels: Pixels
    labels: NDArray[np.int64] | None
    facts: Mapping[str, Any]


def draw_samples(draws: ImageDraws, n: int, max_rows: int, *, progress: bool = True) -> Samples:
    """Draw ``n`` samples; the classes come in turn, so they are balanced.

    Raises:
        ValueError: a setting does not fit the model.
        NonFiniteError: the network gave no finite logits.
    """
    pixels: dict[int, Pixels] = {}
    labels: dict[int, int | None] = {}
    nfe = 0
    for index, sample in draw_images(draws, range(n), max_rows, progress=progress):
        pixels[index], labels[index] = sample.pixels.numpy(), sample.label
        nfe += sample.nfe
    known = [label for label in (labels[index] for index in range(n)) if label is not None]
    return Samples(
        np.stack([pixels[index] for index in range(n)]),
        np.array(known, dtype=np.int64) if known else None,
        {"n": n, "mean_nfe": nfe / n},
    )


def open_samples(folder: Path, shape: tuple[int, int, int], checkpoint_digest: str) -> Samples:
    """Open what `prime-sample` wrote.

    Args:
        folder: its output.
        shape: (H, W, C) of the model's pictures.
        checkpoint_digest: `weights_digest` of the checkpoint that must have made them.

    Returns:
        The samples; their facts are the request they were made for.

    Raises:
        ValueError: the arrays or the request are missing, or of another model.
    """
    try:
        request = read_request(folder / REQUEST_NAME)
    except SampleFileError as error:
        raise ValueError(f"{folder}: {error}; name the --output of prime-sample") from None
    if request.pop("checkpoint", None) != checkpoint_digest:
        raise ValueError(f"{folder}: samples of another checkpoint; name the one that made them")
    try:
        pixels = np.load(folder / SAMPLES_NAME, mmap_mode="r", allow_pickle=False)
        labels_path = folder / LABELS_NAME
        labels = np.load(labels_path, allow_pickle=False) if labels_path.exists() else None
    except (OSError, ValueError):
        raise ValueError(
            f"{folder}: no whole {SAMPLES_NAME} in it; let prime-sample finish, or name its --output"
        ) from None
    if pixels.dtype != np.uint8 or pixels.shape[1:] != shape:
        raise ValueError(
            f"{folder}: {SAMPLES_NAME} is {pixels.dtype} {pixels.shape}, but pictures of the model are {shape}"
        )
    if labels is not None and labels.shape != pixels.shape[:1]:
        raise ValueError(f"{folder}: {LABELS_NAME} does not go with {SAMPLES_NAME}")
    return Samples(pixels, labels, {"n": len(pixels), "folder": str(folder), **request})


def measure_samples(
    samples: Samples,
    train: ImageSet,
    heldout: ImageSet,
    *,
    classifier: Classifier | None,
    inception: Inception | None,
    labels_are_classes: bool,
    num_reference: int,
    seed: int,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Return what can be said about samples.

    Args:
        samples: N >= 2 of them.
        train: real images that samples are compared with.
        heldout: real images that take the place of samples for the floor.
        classifier: for `classifier_feature_distance` and `label_agreement`; None leaves them out.
        inception: for `fid` and `inception_score`; None leaves them out.
        labels_are_classes: whether the labels of the samples are classes of the data.
        num_reference: at most so many training images, M.
        seed: of which real images are taken, and of the splits of the Inception Score.
        device: where the Inception network is.
        progress: show progress bars.

    Raises:
        ValueError: too few samples, or pictures of another shape.
    """
    random = np.random.default_rng(seed)
    reference = _some(train.pixels, num_reference, random)
    floor = _some(heldout.pixels, len(samples.pixels), random)
    figures: dict[str, dict[str, Any]] = {}
    if classifier is not None:
        features, predicted = classifier.judge(samples.pixels)
        figures["classifier_feature_distance"] = compare_features(
            features, classifier.judge(reference)[0], classifier.judge(floor)[0]
        )
        if samples.labels is not None and labels_are_classes:
            agreement = label_agreement(predicted, torch.from_numpy(np.array(samples.labels)))
            agreement["classifier_accuracy"] = classifier.info.accuracy
            agreement["label"] = (
                "share of samples whose label the classifier finds; its own accuracy stands beside it"
            )
            figures["label_agreement"] = agreement
    if inception is not None:
        figures |= inception_metrics(
            inception, samples.pixels, reference, device=device, seed=seed, progress=progress
        )
    return figures


def _some(pixels: Pixels, count: int, random: np.random.Generator) -> Pixels:
    """Return ``count`` images drawn without replacement, or all if there are fewer, in their order."""
    if count >= len(pixels):
        return pixels
    return pixels[np.sort(random.choice(len(pixels), count, replace=False))]
