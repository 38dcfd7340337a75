"""A picture that a client sends: nested lists or a PNG file, read within bounds.

The head of a PNG file is checked before anything is unpacked, so that no small file can become a large picture.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prime_core.canvas import CanvasError
from prime_core.pictures import PNG_MODES
from server.images.known import KnownShape, read_numbers

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD = struct.Struct(">I4sIIBB")  # length and kind of the first chunk, width, height, bits, colour type
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
    try:
        file = base64.b64decode(png, validate=True)
    except (binascii.Error, ValueError):
        raise CanvasError("png", "png is not base64") from None
    _check_head(file, shape)
    try:
        image = Image.open(io.BytesIO(file), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error):
        raise CanvasError("png", "png is damaged: its pixels cannot be read") from None
    if image.mode != PNG_MODES[channels] or "transparency" in image.info or getattr(image, "n_frames", 1) > 1:
        raise CanvasError(
            "png", f"png must be one picture of mode {PNG_MODES[channels]} without transparency"
        )
    found = torch.from_numpy(np.array(image)).long().view(height, width, channels)
    if int(found.max()) > shape.top_pixel:
        raise CanvasError("png", f"png must hold values up to {shape.top_pixel}, as this model's pictures do")
    return found


def _check_head(file: bytes, shape: KnownShape) -> None:
    """Refuse what is no PNG file of the right size and kind."""
    height, width, channels = shape.picture
    head = file[len(_SIGNATURE) : len(_SIGNATURE) + _HEAD.size]
    if not file.startswith(_SIGNATURE) or len(head) < _HEAD.size or head[4:8] != b"IHDR":
        raise CanvasError("png", "png is not a PNG file")
    found = _HEAD.unpack(head)[2:]
    if found != (width, height, 8, _COLOUR_TYPES[channels]):
        raise CanvasError(
            "png",
            f"png must be {width} x {height} pixels (width x height) with {channels} channels of 8 bits, without "
            "palette or alpha",
        )
