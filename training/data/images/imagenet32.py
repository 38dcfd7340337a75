"""ImageNet at 32x32 pixels: 1,281,167 training images in ten batches, 50,000 held-out ones, 1000 classes.

The batches are read in either of the two official forms, pickled or .npz, and converted once to a memory map.
Labels are numbers 1..1000 in the files and 0..999 here. The files hold no names for them, so a class is named
"class 0" to "class 999": by its number here, and never by a bare numeral.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.data.images.cache import Chunk, Conversion, open_cached
from training.data.images.image_set import DataError, ImageSet, Labels
from training.data.images.npz import iter_npz_rows, read_npz_labels
from training.data.images.planar import CHANNELS, SIDE, LabelRange, read_pickled_batch, to_pictures

LABEL_NAMES = tuple(f"class {number}" for number in range(1000))
NUM_IMAGES = {"train": 1_281_167, "heldout": 50_000}
# The official training batches have about 128,120 images.
MAX_BATCH = 200_000
_CHUNK = 1024
_LABELS = LabelRange(1, 1000)
_BATCHES = {
    "train": tuple(f"train_data_batch_{number}" for number in range(1, 11)),
    "heldout": ("val_data",),
}
_FOLDERS = {
    "train": ("", "Imagenet32_train", "Imagenet32_train_npz"),
    "heldout": ("", "Imagenet32_val", "Imagenet32_val_npz"),
}


def read_imagenet32(
    folder: Path, split: Literal["train", "heldout"], cache: Path, *, verify: bool = True
) -> ImageSet:
    """Open one split as a memory map, converting it first where the cache does not hold it.

    Args:
        folder: holds train_data_batch_1 to _10 and val_data, each without an ending (pickled) or with
            `.npz`, directly or in the sub-folders that the official archives make.
        split: "train", or "heldout" for the validation set.
        cache: folder of converted copies, about 3.9 GB for "train".
        verify: refuse batches that do not hold all images of the split together.

    Returns:
        Pixels (N, 32, 32, 3) and labels 0..999.

    Raises:
        DataError: a file is missing, damaged or truncated, or does not hold what its name says.
        OSError: a file cannot be opened, or the cache cannot be written.
    """
    paths = _find(folder, split)
    num_images = NUM_IMAGES[split] if verify else None
    conversion = Conversion(
        name=f"imagenet32-{split}",
        sources=[(path.name, path) for path in paths],
        recipe={},
        picture_shape=(SIDE, SIDE, CHANNELS),
        labelled=True,
        convert=lambda: _convert(paths, num_images),
    )
    pixels, labels = open_cached(cache, conversion)
    _check_count(paths, len(pixels), num_images)  # a copy may have been made without verify
    return ImageSet(f"imagenet32/{split}", pixels, labels, LABEL_NAMES)


def _find(folder: Path, split: str) -> list[Path]:
    names = _BATCHES[split]
    for place in _FOLDERS[split]:
        for ending in ("", ".npz"):
            paths = [folder / place / f"{name}{ending}" for name in names]
            if not paths[0].is_file():
                continue
            for path in paths:
                if not path.is_file():
                    raise DataError(f"{path}: is missing; all {len(names)} files of {split!r} are needed")
            return paths
    raise DataError(
        f"{folder}: holds neither {names[0]} nor {names[0]}.npz; give the folder with the extracted batches "
        "of ImageNet 32x32"
    )


def _check_count(paths: list[Path], count: int, expected: int | None) -> None:
    if expected is not None and count != expected:
        raise DataError(
            f"{paths[0]} and the files that go with it: {count} images instead of {expected}; fetch the official "
            "files, or set verify to false to read files of your own"
        )


def _convert(paths: list[Path], num_images: int | None) -> tuple[int, Iterator[Chunk]]:
    """Look at all labels first: a bad or missing batch is found before gigabytes are written."""
    labels = [_read_labels(path) for path in paths]
    _check_count(paths, sum(map(len, labels)), num_images)
    chunks = (chunk for path, numbers in zip(paths, labels, strict=True) for chunk in _chunks(path, numbers))
    return sum(map(len, labels)), chunks


def _read_labels(path: Path) -> Labels:
    if path.suffix == ".npz":
        return read_npz_labels(path, _LABELS, MAX_BATCH)
    with path.open("rb") as file:
        return read_pickled_batch(file, path, _LABELS, MAX_BATCH)[1]


def _chunks(path: Path, labels: Labels) -> Iterator[Chunk]:
    start = 0
    for rows in _iter_rows(path, len(labels)):
        yield to_pictures(rows), labels[start : start + len(rows)]
        start += len(rows)


def _iter_rows(path: Path, count: int) -> Iterator[NDArray[np.uint8]]:
    if path.suffix == ".npz":
        yield from iter_npz_rows(path, count, _CHUNK)
        return
    with path.open("rb") as file:
        rows, _ = read_pickled_batch(file, path, _LABELS, MAX_BATCH)
        for start in range(0, count, _CHUNK):
            try:
                yield rows.read(file, start, min(start + _CHUNK, count))
            except EOFError as error:
                raise DataError(f"{path}: changed while it was read ({error}); try again") from None
