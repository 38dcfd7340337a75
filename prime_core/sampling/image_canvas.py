"""The canvas of an image request: known pixels or digits, everything else free."""

from __future__ import annotations

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.config import UNetConfig
from prime_core.integers import holds_integers
from prime_core.pixels import PixelCodec, top_pixel
from prime_core.sampling.canvas import Canvas, CanvasError, Numbers, as_tensor, digits_canvas


def image_canvas(
    config: UNetConfig, codec: SubtokenCodec, known: Numbers | None = None, y: Numbers | None = None
) -> Canvas:
    """Lay out an image request.

    Args:
        config: sizes of the picture.
        codec: tokens to digits.
        known: (H, W, C) integers: pixel values, or -1 where free; None for none.
        y: (C, H, W, S) known digits with ``codec.mask_index`` where free; None for none.

    Raises:
        CanvasError: both are given, or a shape or a value is wrong.
    """
    known, y = as_tensor(known), as_tensor(y)
    if known is not None and y is not None:
        raise CanvasError("known", "known and y exclude each other: give pixels or digits")
    shape = (config.channels, config.height, config.width, codec.target_length)
    if y is not None:
        if not isinstance(y, Tensor) or tuple(y.shape) != shape:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise CanvasError("y", f"y must be (channels, height, width, digits) {shape}, got {found}")
        return digits_canvas(codec, y.flatten(0, 2))
    if known is not None:
        return digits_canvas(codec, _known_pixels(config, codec, known))
    return digits_canvas(codec, torch.full((config.length, codec.target_length), codec.mask_index))


def _known_pixels(config: UNetConfig, codec: SubtokenCodec, known: Numbers) -> Tensor:
    """Return the digits (L, S) of known pixels, masked where a channel of the pixel is free."""
    pixels = PixelCodec(config)
    top = top_pixel(codec.vocab_size)
    if not isinstance(known, Tensor) or tuple(known.shape) != pixels.picture_shape:
        found = tuple(known.shape) if isinstance(known, Tensor) else type(known).__name__
        raise CanvasError(
            "known", f"known must be (height, width, channels) {pixels.picture_shape}, got {found}"
        )
    if not holds_integers(known):
        raise CanvasError("known", f"known must hold integers, got {known.dtype}")
    known = known.detach().to("cpu", torch.int64)
    if not -1 <= int(known.min()) <= int(known.max()) <= top:
        raise CanvasError("known", f"known must hold pixel values 0..{top}, or -1 where free")
    free = known < 0
    if config.packing == "rgb24":
        if not torch.equal(free.any(-1), free.all(-1)):
            raise CanvasError("known", "this model packs a pixel's channels: fix all of them or none")
        free_tokens = free.any(-1).flatten().repeat(config.channels)
    else:
        free_tokens = free.movedim(-1, 0).flatten()
    digits = codec.encode(pixels.encode(known.clamp(min=0)))
    return digits.masked_fill(free_tokens[:, None], codec.mask_index)
