"""Pictures as files, read back with pillow and numpy."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from prime_core.pictures import to_grid, to_npy, to_png


def pictures(num: int, *shape: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).integers(0, 255, (num, *shape)).astype(np.uint8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_is_lossless_and_always_the_same(channels: int, mode: str) -> None:
    (picture,) = pictures(1, 5, 7, channels)
    content = to_png(picture)
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode, image.size) == ("PNG", mode, (7, 5))
    assert np.array_equal(np.asarray(image).reshape(5, 7, channels), picture)
    assert to_png(picture.copy()) == content
    assert b"tIME" not in content and b"tEXt" not in content
    facts = {"seed": "7", "label": "1"}
    told = Image.open(io.BytesIO(to_png(picture, facts)))
    assert told.text == facts  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(told).reshape(5, 7, channels), picture)


def test_png_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        to_png(pictures(1, 4, 4, 2)[0])


@pytest.mark.parametrize(("num", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3), (10, 3, 4)])
def test_grid_holds_every_picture_apart(num: int, rows: int, columns: int) -> None:
    made = pictures(num, 4, 6, 3)
    grid = to_grid(made)
    assert grid.shape == (rows * 6 - 2, columns * 8 - 2, 3)
    rest = grid.copy()
    for index in range(num):
        top, left = index // columns * 6, index % columns * 8
        assert np.array_equal(grid[top : top + 4, left : left + 6], made[index])
        rest[top : top + 4, left : left + 6] = 255
    assert (rest == 255).all()
    assert np.array_equal(to_grid(made, num)[:, -6:], made[-1])  # all in one row


def test_npy_is_read_back() -> None:
    made = pictures(3, 4, 6, 5)
    assert np.array_equal(np.load(io.BytesIO(to_npy(made)), allow_pickle=False), made)
