"""Makers of small files in the exact formats of the image data sets.

Every maker is deterministic in `seed` and returns the pixels (N, H, W, C) uint8 and labels (N,) int64 that a
correct reader finds, so that tests compare with what was written and not with what was read.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Made = tuple[NDArray[np.uint8], NDArray[np.int64]]


def random_images(n: int, shape: tuple[int, int, int], classes: int, seed: int) -> Made:
    """Images of uniform noise; the labels run through the classes, so that every class occurs early."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
    return pixels, np.arange(n, dtype=np.int64) % classes


def make_idx(
    folder: Path, n: int = 12, *, split: str = "train", seed: int = 0, compress: bool = True
) -> Made:
    """Write the two Fashion-MNIST files of one split ("train" or "heldout"); returns (n, 28, 28, 1)."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = random_images(n, (28, 28, 1), 10, seed)
    prefix = {"train": "train", "heldout": "t10k"}[split]
    files = {
        f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x0803, n, 28, 28) + pixels.tobytes(),
        f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x0801, n) + labels.astype(np.uint8).tobytes(),
    }
    for name, content in files.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)
    return pixels, labels
