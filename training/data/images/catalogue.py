"""The data sets that can be trained on, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from training.data.images.cifar10 import read_cifar10
from training.data.images.fashion_mnist import read_fashion_mnist
from training.data.images.image_set import DataError, ImageSet

DatasetName = Literal["cifar10", "imagenet32", "fashion-mnist", "folder"]
Split = Literal["train", "heldout"]


def open_images(
    dataset: DatasetName,
    path: Path,
    split: Split,
    cache: Path,
    *,
    verify: bool = True,
) -> ImageSet:
    """Open one split of a data set.

    Args:
        dataset: "cifar10", "imagenet32", "fashion-mnist" or "folder".
        path: where the files are; see the reader of each data set.
        split: "train" or "heldout".
        cache: folder for converted copies of large data sets; made when needed.
        verify: for "cifar10": refuse an archive whose MD5 is not that of an official one.

    Raises:
        DataError: the files are missing, damaged or not those of the data set.
    """
    if dataset == "fashion-mnist":
        return read_fashion_mnist(path, split)
    if dataset == "cifar10":
        return read_cifar10(path, split, verify=verify)
    raise DataError(f"data set {dataset!r} is not known")
