"""A picture that a client sends: nested lists or a PNG file, read within bounds.

The head of a PNG file is checked before anything is unpacked, and only its head and its pixels are, so that no small
file can become a large picture.
"""

from __future__ import annotations

import base64
import io
import logging

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prime_core.pictures import PNG_MODES, Pixels
from prime_core.sampling.canvas import CanvasError
from server.images.known import KnownShape, read_numbers
from server.images.png_chunks import NotPlainError, NotPngError, PngHead, plain_png

logger = logging.getLogger("prime.server")

_COLOUR_TYPES = {1: 0, 3: 2}  # of PNG files without palette or alpha, by channels


def read_picture(pixels: object, png: str | None, shape: KnownShape) -> Tensor:
    """Return the pixels (H, W, C) int64 of a picture that is given in one of two ways.

    Args:
        pixels: parsed JSON: lists of numbers; None if not given.
        png: base64 of a PNG file; None if not given.
        shape: what fits the model.

    Raises:
        CanvasError: both are given or none, or it does not follow the rule.
    """
    if (pixels is None) == (png is None):
        what = "none is given" if png is None else "both are given"
        raise CanvasError("pixels", f"exactly one of pixels and png is needed: {what}")
    if png is not None:
        return _read_png(png, shape)
    flat = read_numbers(
        pixels, shape.picture, shape.top_pixel, None, shape.rule_of_pixels, param="pixels", whole_pixels=True
    )
    return torch.tensor(flat).view(shape.picture)


def _read_png(png: str, shape: KnownShape) -> Tensor:
    height, width, channels = shape.picture
    if channels not in PNG_MODES:
        raise CanvasError("png", f"a PNG file cannot hold {channels} channels; give pixels")
    mode = PNG_MODES[channels]
    try:
        head, file = plain_png(base64.b64decode(png, validate=True))
    except NotPngError:  # before binascii's, which is a ValueError too
        raise CanvasError("png", "png is not a PNG file, or a damaged one") from None
    except NotPlainError:
        raise CanvasError("png", f"png must be one picture of mode {mode} without transparency") from None
    except ValueError:
        raise CanvasError("png", "png is not base64") from None
    if head != PngHead(width, height, 8, _COLOUR_TYPES[channels]):
        raise CanvasError(
            "png",
            f"png must be {width} x {height} pixels (width x height) with {channels} "
            f"{'channel' if channels == 1 else 'channels'} of 8 bits, without palette or alpha",
        )
    found = torch.from_numpy(_unpacked(file, (width, height), mode)).long().view(height, width, channels)
    if int(found.max()) > shape.top_pixel:
        raise CanvasError("png", f"png must hold values up to {shape.top_pixel}, as this model's pictures do")
    return found


def _unpacked(file: bytes, size: tuple[int, int], mode: str) -> Pixels:
    """Return the pixels of a file whose head was checked; that the library agrees is checked before it unpacks."""
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            if (image.size, image.mode) != (size, mode):
                raise ValueError(f"a {image.mode} picture of {image.size}, not what its head says")
            image.load()
            return np.array(image)
    # Whatever a decoder of foreign bytes raises, the bytes are at fault.
    except Exception as error:  # noqa: BLE001
        logger.debug("a PNG file cannot be read: %s", type(error).__name__)
        raise CanvasError("png", "png is damaged: its pixels cannot be read") from None
