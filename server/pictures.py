"""Pictures as files: PNG, a grid of them, and numpy's .npy. The same pixels always give the same bytes.

Shapes: n pictures of H x W pixels with C channels, uint8.
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

GRID_GAP = 2
GRID_COLOUR = 255
# Channels of pictures that PNG has.
PNG_CHANNELS = (1, 3)


def to_png(pixels: Pixels) -> bytes:
    """Return a PNG file without any time stamp or text.

    Args:
        pixels: (H, W, C) uint8; C is 1 (grey) or 3 (RGB).

    Raises:
        ValueError: if PNG has no such channels.
    """
    if pixels.shape[-1] not in PNG_CHANNELS:
        raise ValueError(f"PNG holds pictures of 1 or 3 channels, got {pixels.shape[-1]}")
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def to_grid(pictures: Pixels) -> Pixels:
    """Return one picture that holds all, row by row, nearly square, with gaps of 2 white pixels.

    Args:
        pictures: (n, H, W, C) uint8, n at least 1.
    """
    num, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    size = (rows * (height + GRID_GAP) - GRID_GAP, columns * (width + GRID_GAP) - GRID_GAP, channels)
    grid = np.full(size, GRID_COLOUR, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + GRID_GAP), index % columns * (width + GRID_GAP)
        grid[top : top + height, left : left + width] = picture
    return grid


def to_npy(pictures: Pixels) -> bytes:
    """Return a .npy file of pictures (n, H, W, C) uint8."""
    file = io.BytesIO()
    np.save(file, pictures, allow_pickle=False)
    return file.getvalue()
