"""Tiny labelled pictures that a network learns in seconds."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from training.data.images import ImageSet

NAMES = ("left", "right")


def bars(n: int, seed: int, name: str = "bars/train", size: int = 8, num_labels: int = 2) -> ImageSet:
    """Grey pictures (size, size, 1) with a bright bar whose place is the label."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % num_labels
    pixels = random.integers(0, 60, (n, size, size, 1), dtype=np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        picture[:, 1 + label * (size // num_labels)] += 180
    names = NAMES if num_labels == 2 else tuple(f"bar {label}" for label in range(num_labels))
    return ImageSet(name, pixels, labels.astype(np.int64), names)


def write_fashion_files(folder: Path, train: int, heldout: int) -> None:
    """Bars of 28 x 28 pixels in ten places as Fashion-MNIST files."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n, seed in (("train", train, 0), ("t10k", heldout, 1)):
        images = bars(n, seed, size=28, num_labels=10)
        assert images.labels is not None
        header = np.array([2051, n, 28, 28], dtype=">i4").tobytes()
        labels = np.array([2049, n], dtype=">i4").tobytes() + images.labels.astype(np.uint8).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(header + images.pixels.tobytes())
        )
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
