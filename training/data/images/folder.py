"""A folder of PNG and JPEG files as a data set, converted once to a memory map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from training.data.images.cache import Chunk, Conversion, open_cached
from training.data.images.image_set import ImageSet
from training.data.images.picture_decoder import decode_picture, picture_shape
from training.data.images.picture_folder import Listing, list_pictures

MAX_SIDE = 4096


def read_folder(
    folder: Path, split: Literal["train", "heldout"], cache: Path, *, size: tuple[int, int] | None = None
) -> ImageSet:
    """Open one split as a memory map, converting it first where the cache does not hold it.

    Args:
        folder: the pictures, in sub-folders (classes) or not; see `picture_folder` for the layout and for
            which pictures are held out.
        split: "train" or "heldout".
        cache: folder of converted copies.
        size: (H, W), each 1..4096: pictures are cropped around their centre and resized (Lanczos); None
            where all pictures have the same size.

    Returns:
        Pixels (N, H, W, C), C 1 where the first picture is grey, else 3; labels where there are classes.

    Raises:
        DataError: the folder has another layout, or a picture cannot be read.
        OSError: the cache cannot be written.
        ValueError: ``size`` is outside its range.
    """
    if size is not None and not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"size is {size}: give (height, width), each 1..{MAX_SIDE}")
    listing = list_pictures(folder, split)
    shape = picture_shape(listing.first.path, size)
    conversion = Conversion(
        name=f"folder-{split}",
        sources=[(picture.name, picture.path) for picture in listing.pictures],
        recipe={"size": size, "class_names": listing.class_names},
        picture_shape=shape,
        labelled=bool(listing.class_names),
        convert=lambda: (len(listing.pictures), _decode_all(listing, shape, resize=size is not None)),
    )
    pixels, labels = open_cached(cache, conversion)
    return ImageSet(f"folder/{split}", pixels, labels, listing.class_names)


def _decode_all(listing: Listing, shape: tuple[int, int, int], *, resize: bool) -> Iterator[Chunk]:
    numbers = {name: number for number, name in enumerate(listing.class_names)}
    for picture in listing.pictures:
        pixels = decode_picture(picture.path, shape, resize=resize)[None]
        if picture.class_name is None:
            yield pixels, None
        else:
            yield pixels, np.array([numbers[picture.class_name]], dtype=np.int64)
