"""The data sets that can be trained on, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from training.data.images.cifar10 import read_cifar10
from training.data.images.fashion_mnist import read_fashion_mnist
from training.data.images.folder import read_folder
from training.data.images.image_set import DataError, ImageSet
from training.data.images.imagenet32 import read_imagenet32

DatasetName = Literal["cifar10", "imagenet32", "fashion-mnist", "folder"]
Split = Literal["train", "heldout"]
_VERIFIED = ("cifar10", "imagenet32")
_WHAT_TO_PUT = {
    "cifar10": "put cifar-10-python.tar.gz or cifar-10-binary.tar.gz there, or the folder either unpacks to",
    "imagenet32": "put the extracted batches there: train_data_batch_1 to _10 and val_data, pickled or .npz",
    "fashion-mnist": "the Debian package dataset-fashion-mnist holds its four files",
    "folder": "put PNG or JPEG files there, in a folder a class or not",
}


def open_images(
    dataset: DatasetName,
    path: Path,
    split: Split,
    cache: Path,
    *,
    size: tuple[int, int] | None = None,
    verify: bool = True,
) -> ImageSet:
    """Open one split of a data set.

    Args:
        dataset: "cifar10", "imagenet32", "fashion-mnist" or "folder".
        path: where the files are; see the reader of each data set.
        split: "train" or "heldout".
        cache: folder of converted copies, made when needed. "cifar10" and "fashion-mnist" fit into memory
            and write nothing there.
        size: (H, W) that the pictures of a "folder" are cropped and resized to; None where they all have
            the same size. The other data sets have their own size and refuse this.
        verify: refuse files that are not the whole official ones: for "cifar10" an archive of another MD5, or
            extracted files without all their records; for "imagenet32" batches without all images. The other data
            sets have no official size; verify=False is refused there.

    Raises:
        DataError: the files are missing, damaged or not those of the data set.
        OSError: the cache cannot be written.
        ValueError: an unknown data set or split, or an option that the data set does not have.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}: give one of {', '.join(get_args(Split))}")
    if size is not None and dataset != "folder":
        raise ValueError(f"size is given, and {dataset!r} has its own: leave it out, or use a folder")
    if not verify and dataset not in _VERIFIED:
        raise ValueError(f"verify is false, and {dataset!r} is not verified: leave it out")
    if dataset in _WHAT_TO_PUT and not path.exists():
        raise DataError(
            f"{path}: cannot be read: No such file or directory; {_WHAT_TO_PUT[dataset]}, or give the path where the "
            "data is. Nothing is downloaded"
        )
    if dataset == "cifar10":
        return read_cifar10(path, split, verify=verify)
    if dataset == "imagenet32":
        return read_imagenet32(path, split, cache, verify=verify)
    if dataset == "fashion-mnist":
        return read_fashion_mnist(path, split)
    if dataset == "folder":
        return read_folder(path, split, cache, size=size)
    raise ValueError(f"dataset is {dataset!r}: give one of {', '.join(get_args(DatasetName))}")
