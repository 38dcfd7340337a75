"""Fashion-MNIST: 70,000 grey images of 28x28 pixels in ten classes, in four IDX files.

An IDX file is a big-endian header (a magic number, then each size as 32 bits) and the bytes of the array.
The files are read plain or compressed with gzip, as they are distributed.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
from numpy.typing import NDArray

from prime_core.pictures import Pixels
from training.data.images.image_set import DataError, ImageSet, Labels

LABEL_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MAX_IMAGES = 60_000
SIDE = 28
# Two zero bytes, the code of the element type (8: unsigned byte), the number of dimensions.
_IMAGE_MAGIC, _LABEL_MAGIC = 0x0803, 0x0801
_PREFIX = {"train": "train", "heldout": "t10k"}
_WHERE = (
    "give the folder with the four Fashion-MNIST files; the Debian package dataset-fashion-mnist puts them "
    "into /usr/share/datasets/fashion-mnist"
)


def read_fashion_mnist(folder: Path, split: Literal["train", "heldout"]) -> ImageSet:
    """Read one split into memory; "heldout" is the test set of 10,000 images (t10k).

    Args:
        folder: holds PREFIX-images-idx3-ubyte and PREFIX-labels-idx1-ubyte, each plain or with `.gz`; where
            both are there, the plain one is read.
        split: "train" or "heldout".

    Returns:
        Pixels (N, 28, 28, 1) and labels 0..9.

    Raises:
        DataError: a file is missing, damaged, truncated or over-long, or does not hold such images.
    """
    images = _find(folder, f"{_PREFIX[split]}-images-idx3-ubyte")
    labels = _find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
    pixels = _read_pixels(images)
    numbers = _read_labels(labels)
    if len(numbers) != len(pixels):
        raise DataError(
            f"{labels}: {len(numbers)} labels for the {len(pixels)} images of {images.name}; fetch both again"
        )
    return ImageSet(f"fashion-mnist/{split}", pixels, numbers, LABEL_NAMES)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: holds neither {name} nor {name}.gz; {_WHERE}")


def _read_pixels(path: Path) -> Pixels:
    content = _read_idx(path, _IMAGE_MAGIC, (SIDE, SIDE))
    return content.reshape(-1, SIDE, SIDE, 1)


def _read_labels(path: Path) -> Labels:
    content = _read_idx(path, _LABEL_MAGIC, ())
    wrong = np.flatnonzero(content >= len(LABEL_NAMES))
    if len(wrong):
        raise DataError(
            f"{path}: record {wrong[0]}: label {content[wrong[0]]}, not 0..9; fetch the file again"
        )
    return content.astype(np.int64)


def _read_idx(path: Path, magic: int, record_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the bytes of an IDX file, flat, header checked; never more than it should hold is unpacked."""
    header_format = f">{2 + len(record_shape)}I"
    header_bytes = struct.calcsize(header_format)
    try:
        with _open(path) as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes:
                raise DataError(f"{path}: offset {len(header)}: ends inside the header; fetch the file again")
            found, count, *sizes = struct.unpack(header_format, header)
            _check_header(path, magic, found, count, record_shape, tuple(sizes))
            expected = count * int(np.prod(record_shape, dtype=np.int64))
            # One byte more than expected shows trailing bytes, and lets gzip check the sum at the end.
            content = file.read(expected + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) != expected:
        what = "ends too early" if len(content) < expected else "trailing bytes"
        place = header_bytes + min(len(content), expected)
        raise DataError(f"{path}: offset {place}: {what}, {count} records expected; fetch the file again")
    return np.frombuffer(content, dtype=np.uint8)


def _check_header(
    path: Path, magic: int, found: int, count: int, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    if found != magic:
        raise DataError(f"{path}: offset 0: magic number {found:#010x} instead of {magic:#010x}; {_WHERE}")
    if not 1 <= count <= MAX_IMAGES:
        raise DataError(f"{path}: offset 4: {count} records, the limit is 1..{MAX_IMAGES}; {_WHERE}")
    if sizes != shape:
        raise DataError(f"{path}: offset 8: images of {sizes} pixels instead of {shape}; {_WHERE}")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
