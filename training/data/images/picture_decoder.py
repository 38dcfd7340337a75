"""Decodes one PNG or JPEG file to pixels of the size and channels that are asked for.

What a file claims is checked before anything is decoded: only two formats are tried, and width times height
is bounded. Colours are taken as stored: profiles and EXIF orientation are not applied.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from prime_core.pictures import Pixels
from training.data.images.image_set import DataError

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 2**25
# What Pillow raises on damaged files; the decompression bomb is its own bound, far above MAX_PIXELS.
_DAMAGE = (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    OSError,
)
_GREY_MODES = ("1", "L")
_COLOUR_MODES = ("RGB", "P", "CMYK", "YCbCr", "RGBA", "LA", "PA")


def picture_shape(path: Path, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Return (H, W, C) of the pictures of a folder whose first picture is ``path``.

    Args:
        path: a picture; without ``size`` all others must have its height and width. C is 1 where it is grey,
            else 3.
        size: (H, W) that all pictures are brought to.

    Raises:
        DataError: not a picture that can be read here.
    """
    with _open(path) as image:
        channels = 1 if image.mode in _GREY_MODES else 3
        return (*(size or (image.height, image.width)), channels)


def decode_picture(path: Path, shape: tuple[int, int, int], *, resize: bool) -> Pixels:
    """Return the pixels (H, W, C) uint8 of one picture.

    Args:
        path: a PNG or JPEG file; of several frames the first is taken.
        shape: (H, W, C), C 1 or 3. Grey pictures become coloured ones where C is 3.
        resize: crop the picture around its centre to the ratio H : W and resize it (Lanczos); else it must
            have the size.

    Raises:
        DataError: damaged, too large, of another size, coloured where C is 1, transparent, or of more than
            8 bits.
    """
    height, width, channels = shape
    with _open(path) as image:
        if not resize and (image.height, image.width) != (height, width):
            raise DataError(
                f"{path}: {image.height}x{image.width} pixels instead of {height}x{width} (height x width) "
                "like the first picture; give `size` to crop and resize all pictures"
            )
        if channels == 1 and image.mode not in _GREY_MODES:
            raise DataError(
                f"{path}: a picture in colour ({image.mode}), and the first one is grey; make them all alike"
            )
        with _damage_named(path):
            _refuse_transparency(path, image)
            plain = image.convert("L" if channels == 1 else "RGB")
        if resize:
            plain = _crop(plain, height, width).resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(plain, dtype=np.uint8).reshape(shape)


def _open(path: Path) -> Image.Image:
    """Open and decode a picture, its claims checked before anything is decoded."""
    with _damage_named(path):
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: larger than {MAX_FILE_BYTES} bytes: refused; make it smaller")
        with path.open("rb") as file:
            image = Image.open(file, formats=("PNG", "JPEG"))
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width}x{image.height} pixels, at most {MAX_PIXELS} in all: refused; make it "
                    "smaller"
                )
            if image.mode not in _GREY_MODES + _COLOUR_MODES:
                raise DataError(f"{path}: pixels of kind {image.mode}; save it with 8 bits per channel")
            image.load()
            if image.format == "PNG":
                _require_end(file)
    return image


def _require_end(file: BinaryIO) -> None:
    """Refuse a PNG that does not reach its last chunk: Pillow is content once it has enough bytes for pixels."""
    size = file.seek(0, os.SEEK_END)
    place = file.seek(8)
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("it is cut: the last chunk, IEND, is missing")
        length, kind = struct.unpack(">I4s", head)
        place = file.seek(place + 8 + length + 4)
        if place > size:
            raise ValueError("it is cut inside a chunk")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what Pillow raises into a DataError. Only its calls belong inside: a fault of ours is no damage."""
    try:
        with warnings.catch_warnings():
            # Broken metadata does not change the pixels; a bomb is an error and not a warning.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except DataError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: not a PNG or JPEG file that can be read ({reason}); remove it") from None


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the largest rectangle of the ratio height : width out of the centre.

    Cropping comes first and by itself: given a box, Pillow's filter would reach over its edges.
    """
    crop_height = min(image.height, max(1, round(image.width * height / width)))
    crop_width = min(image.width, max(1, round(image.height * width / height)))
    left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def _refuse_transparency(path: Path, image: Image.Image) -> None:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A").getextrema()
        if alpha != (255, 255):
            raise DataError(f"{path}: has transparent pixels; put it onto a background first")
