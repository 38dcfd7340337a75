"""Pictures as files: PNG, a grid of them, and numpy's .npy. The same pixels always give the same bytes.

Shapes: n pictures of H x W pixels with C channels, uint8.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Pixels = NDArray[np.uint8]

GRID_GAP = 2
GRID_COLOUR = 255
# Pillow's mode of pictures of so many channels; PNG files have no others here.
PNG_MODES: Mapping[int, str] = {1: "L", 3: "RGB"}


def to_png(pixels: Pixels, facts: Mapping[str, str] | None = None) -> bytes:
    """Return a PNG file without any time stamp.

    Args:
        pixels: (H, W, C) uint8; C is 1 (grey) or 3 (RGB).
        facts: ASCII texts by name, stored beside the pixels; None for no text.

    Raises:
        ValueError: if PNG has no such channels.
    """
    if pixels.shape[-1] not in PNG_MODES:
        raise ValueError(f"PNG holds pictures of 1 or 3 channels, got {pixels.shape[-1]}")
    info = PngInfo()
    for name, value in ({} if facts is None else facts).items():
        info.add_text(name, value)
    file = io.BytesIO()
    flat = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(np.ascontiguousarray(flat)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def to_grid(pictures: Pixels, columns: int | None = None) -> Pixels:
    """Return one picture that holds all, row by row, with gaps of 2 white pixels.

    Args:
        pictures: (n, H, W, C) uint8, n at least 1.
        columns: pictures side by side; None for a nearly square grid.
    """
    num, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(num)) if columns is None else columns
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
