"""Batches of 32x32 images as CIFAR-10 and ImageNet-32 store them: rows of 3072 bytes, all red, green, blue.

Shapes: N images of a batch; a row is channel-major, (3, 32, 32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from prime_core.pictures import Pixels
from training.data.images.image_set import DataError, Labels
from training.data.images.pickle_reader import read_pickled_dict
from training.data.images.pickled_numpy import PickledArray

SIDE, CHANNELS = 32, 3
ROW_BYTES = CHANNELS * SIDE * SIDE


@dataclass(frozen=True)
class LabelRange:
    """The labels of a file format: ``first`` to ``last``; they become 0..last - first."""

    first: int
    last: int


def to_pictures(rows: NDArray[np.uint8]) -> Pixels:
    """Turn rows (N, 3072) into pictures (N, 32, 32, 3)."""
    planes = rows.reshape(-1, CHANNELS, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def check_labels(path: Path, labels: Sequence[Any] | NDArray[Any], count: int, valid: LabelRange) -> Labels:
    """Return the labels of ``count`` images, counted from 0.

    Args:
        path: file name for messages.
        labels: a list of integers or an integer array (count,), as found in the file.
        count: number of images of the batch.
        valid: the labels that may occur.

    Raises:
        DataError: too few or too many labels, one that is not an integer, or one outside the range.
    """
    if len(labels) != count:
        raise DataError(f"{path}: {len(labels)} labels for {count} images; fetch the file again")
    if isinstance(labels, np.ndarray):
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(f"{path}: labels of type {labels.dtype} {labels.shape}, not integers (N,)")
        values = labels.tolist()
    else:
        values = labels
    for record, label in enumerate(values):
        if type(label) is not int or not valid.first <= label <= valid.last:
            shown = label if type(label) is int and abs(label) < 2**64 else "of another kind"
            raise DataError(
                f"{path}: record {record}: label {shown}, not {valid.first}..{valid.last}; fetch the file again"
            )
    return np.array(values, dtype=np.int64) - valid.first


def check_rows(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], max_count: int) -> int:
    """Check the array of a batch and return N.

    Raises:
        DataError: not uint8 (N, 3072) with N in 1..max_count.
    """
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != ROW_BYTES or not 1 <= shape[0] <= max_count:
        raise DataError(
            f"{path}: data is {dtype} {shape}, not uint8 (1..{max_count}, {ROW_BYTES}); fetch the official file"
        )
    return shape[0]


def read_pickled_batch(
    file: BinaryIO, path: Path, valid: LabelRange, max_count: int
) -> tuple[PickledArray, Labels]:
    """Read a pickled batch: a dictionary with `data` (N, 3072) uint8 and `labels`; other keys are passed over.

    Args:
        file: the batch, open and seekable.
        path: its name for messages.
        valid: the labels that may occur.
        max_count: largest N that the format knows.

    Returns:
        The rows, to be read from ``file``, and the labels (N,) from 0.

    Raises:
        DataError: not such a batch; see also `read_pickled_dict`.
    """
    batch = read_pickled_dict(file, path)
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, PickledArray):
        raise DataError(f"{path}: holds no array named data; fetch the official file")
    count = check_rows(path, data.dtype, data.shape, max_count)
    if isinstance(labels, PickledArray) and len(labels.shape) == 1:
        labels = labels.read(file, 0, labels.shape[0])
    if not isinstance(labels, (list, np.ndarray)):
        raise DataError(f"{path}: holds no list named labels; fetch the official file")
    return data, check_labels(path, labels, count, valid)
