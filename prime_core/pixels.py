"""Pictures as tokens: which numbers of a picture the network predicts.

Shapes: H and W pixels high and wide, C channels of the picture, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prime_core.config import UNetConfig
from prime_core.integers import holds_integers

_SUPER_BASE = 4096


def top_pixel(vocab_size: int) -> int:
    """Return the largest pixel value of a model with V tokens: V - 1, or 255 where a pixel is packed into tokens."""
    return min(vocab_size, 256) - 1


class PixelCodec:
    """Pixels <-> tokens in channel-major order, as the configuration's ``packing`` says.

    "none": token c H W + h W + w is the value of channel c at pixel (h, w). "rgb24" (super-tokens, target_length =
    2/3 of MDM-Prime): a pixel is the number R 2^16 + G 2^8 + B, and its two digits of base 4096 are the tokens.

    Attributes:
        picture_shape: (H, W, C).
    """

    def __init__(self, config: UNetConfig) -> None:
        """Take the sizes and the packing from a network's configuration."""
        self._packed = config.packing == "rgb24"
        self._planes = (config.channels, config.height, config.width)
        self.picture_shape = (config.height, config.width, 3 if self._packed else config.channels)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the tokens of pictures.

        Args:
            pixels: (..., H, W, C) integers in 0..255.

        Returns:
            x_0 (..., L) int64.

        Raises:
            ValueError: if the shape or a value is wrong.
        """
        if pixels.shape[-3:] != self.picture_shape:
            raise ValueError(
                f"pictures must be (height, width, channels) {self.picture_shape}, got {tuple(pixels.shape)}"
            )
        if not holds_integers(pixels) or (
            pixels.numel() and not 0 <= int(pixels.min()) <= int(pixels.max()) <= 255
        ):
            raise ValueError(f"pixels must be integers in 0..255, got {pixels.dtype}")
        planes = pixels.long().movedim(-1, -3)
        if self._packed:
            red, green, blue = planes.unbind(-3)
            number = red << 16 | green << 8 | blue
            planes = torch.stack([number // _SUPER_BASE, number % _SUPER_BASE], -3)
        return planes.flatten(-3)

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the pictures of tokens.

        Args:
            x_0: (..., L) integers.

        Returns:
            pixels (..., H, W, C) uint8.

        Raises:
            ValueError: if the number of tokens is wrong, or a token is no pixel value.
        """
        length = self._planes[0] * self._planes[1] * self._planes[2]
        if x_0.shape[-1:] != (length,):
            raise ValueError(f"a picture has {length} tokens, got shape {tuple(x_0.shape)}")
        limit = _SUPER_BASE if self._packed else 256
        if x_0.numel() and not 0 <= int(x_0.min()) <= int(x_0.max()) < limit:
            raise ValueError(f"tokens of a picture must be in 0..{limit - 1}")
        planes = x_0.long().unflatten(-1, self._planes)
        if self._packed:
            high, low = planes.unbind(-3)
            number = high * _SUPER_BASE + low
            planes = torch.stack([number >> 16, number >> 8 & 255, number & 255], -3)
        pixels: Tensor = planes.movedim(-3, -1).to(torch.uint8)
        return pixels
