"""What every image data set becomes: pixels, labels and the names of the labels.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prime_core.pictures import Pixels

Labels = NDArray[np.int64]

_DIGEST_ROWS = 4096  # images in memory at a time


class DataError(ValueError):
    """Images cannot be read; the message names the file, the offset or record, and the remedy."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set of labelled or unlabelled images of one size.

    The arrays are read-only, and `pixels` may be a memory map of a file larger than memory. Indexing with an
    array of numbers (`images.pixels[numbers]`) reads just those images into a new, writable array.

    Attributes:
        name: the data set and the split, such as "cifar10/train".
        pixels: (N, H, W, C) uint8, N >= 1, as pictures have them: rows from the top, channels last.
        labels: (N,) int64 in 0..len(label_names) - 1, or None where the images have no labels.
        label_names: what the labels mean, in their order; empty without labels.

    Raises:
        ValueError: shapes, types or label numbers contradict the above.
    """

    name: str
    pixels: Pixels
    labels: Labels | None
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.size == 0:
            raise ValueError(
                f"{self.name}: pixels are {self.pixels.dtype} {self.pixels.shape}: give uint8 (N, H, W, C), "
                "none of them 0"
            )
        self.pixels.setflags(write=False)
        if self.labels is None:
            if self.label_names:
                raise ValueError(f"{self.name}: label_names without labels: leave label_names empty")
            return
        if self.labels.dtype != np.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"{self.name}: labels are {self.labels.dtype} {self.labels.shape}: give int64 "
                f"({len(self.pixels)},), one per image"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.label_names):
            raise ValueError(
                f"{self.name}: labels span {self.labels.min()}..{self.labels.max()}: they must name one of "
                f"the {len(self.label_names)} label_names"
            )
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and their names: two data sets of one name are told apart."""
        digest = hashlib.sha256(repr((self.pixels.shape, self.label_names)).encode())
        for first in range(0, len(self), _DIGEST_ROWS):
            digest.update(self.pixels[first : first + _DIGEST_ROWS].tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""
        _, height, width, channels = self.pixels.shape
        return height, width, channels
