"""Picture files as they are read: whole or not at all, with what is stored beside the pixels.

Shapes: H height, W width, C channels.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from prime_core.pictures import PNG_MODES, Pixels

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class PictureError(ValueError):
    """A picture cannot be read or has another size; the message names the file."""


def read_picture(path: Path, shape: tuple[int, int, int]) -> tuple[Pixels, dict[str, str]]:
    """Read a picture; grey and colour are converted into each other.

    The size is compared before anything is decoded; checksums and the end of the file are checked.

    Args:
        path: a PNG or JPEG file.
        shape: (H, W, C) that it must have, C = 1 or 3.

    Returns:
        pixels (H, W, C) uint8, and the texts stored beside them.

    Raises:
        PictureError: missing, no picture, damaged, cut short or of another size.
    """
    height, width, channels = shape
    if channels not in PNG_MODES:
        raise PictureError(f"{path}: a picture file has 1 or 3 channels, and the model has {channels}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded yet
            image = Image.open(path, formats=("PNG", "JPEG"))
        with image:
            if image.size != (width, height):
                raise PictureError(
                    f"{path}: {image.size[1]} x {image.size[0]} pixels (height x width), must be {height} x {width}"
                )
            image.load()
            _check_end(path, str(image.format))
            facts = {str(name): str(value) for name, value in getattr(image, "text", {}).items()}
            pixels = np.asarray(image.convert(PNG_MODES[channels]))
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(
            f"{path}: not a sound PNG or JPEG ({' '.join(str(error).split())[:100]})"
        ) from None
    return pixels.reshape(shape), facts


def _check_end(path: Path, kind: str) -> None:
    """Refuse a PNG without its last bytes, which the decoder does not miss."""
    if kind == "PNG" and not path.read_bytes().endswith(_PNG_END):
        raise PictureError(f"{path}: cut short; the end of the file is missing")
