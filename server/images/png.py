"""Pictures as they travel inside of JSON: PNG files in base64, finished or in the middle of sampling."""

from __future__ import annotations

import base64

from torch import Tensor

from prime_core.checkpoint import Checkpoint
from prime_core.pictures import to_png
from prime_core.pixels import PixelCodec
from prime_core.sampling.provisional import provisional_pixels


def encoded_png(pixels: Tensor) -> str:
    """Return a picture (H, W, C) uint8 as a PNG file in base64."""
    return base64.b64encode(to_png(pixels.numpy())).decode()


class ProvisionalPng:
    """Makes pictures of partly masked digits: masked ones stand at the middle of their range."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take the codecs of an image model."""
        self._codec = checkpoint.codec
        self._pixels = PixelCodec(checkpoint.config.image_model)

    def of(self, y: Tensor) -> str:
        """Return the picture of digits (L, S) as a PNG file in base64."""
        return encoded_png(provisional_pixels(self._codec, self._pixels, y))
