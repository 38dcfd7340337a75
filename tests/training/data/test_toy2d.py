"""The two-dimensional toy: a PNG, and nothing else, as a distribution over cells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.toy2d import NUM_ROWS, Toy2dRows, open_picture, swirl
from training.images.preview import columns_for, paint_beside


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Two by two cells of four pixels each: black, a third of the light, black, two thirds."""
    pixels = np.array([[0, 100], [0, 200]], dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_brightness_is_probability_and_rows_come_in_proportion(picture: Path) -> None:
    rows = Toy2dRows(open_picture(str(picture), 2))
    assert rows.probabilities == pytest.approx(np.array([[0, 1 / 3], [0, 2 / 3]]))
    assert rows.entropy == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    seen = np.array([rows.row(index) for index in range(0, NUM_ROWS, NUM_ROWS // 300)])
    assert set(map(tuple, seen.tolist())) == {(0, 1), (1, 1)}
    assert (seen[:, 0] == 1).mean() == pytest.approx(2 / 3, abs=0.01)


def test_a_row_is_the_middle_of_its_part_and_the_last_is_a_cell_with_probability() -> None:
    thirds = np.array([[0.0, 1.0], [1.0, 1.0]]) / 3
    rows = Toy2dRows(thirds)
    assert rows.row(0).tolist() == [0, 1]
    # A third of all rows is 349525.33: at their middles the first cell has one row fewer than from their beginnings.
    assert [rows.row(index).tolist() for index in (349_524, 349_525)] == [[0, 1], [1, 0]]
    assert rows.row(NUM_ROWS - 1).tolist() == [1, 1]
    # As rounding may have it: the ends are below the last quantile.
    assert Toy2dRows(np.array([[0.0, 0.5], [0.5 - 1e-6, 0.0]])).row(NUM_ROWS - 1).tolist() == [1, 0]


def test_the_swirl_has_its_first_row_on_top() -> None:
    picture = swirl(64)
    for down, is_lit in ((20, True), (43, False)):  # as far above the centre as below it
        x, y = (8.5 - 32) / 32, (32 - (down + 0.5)) / 32
        rings = 2 * math.log(math.hypot(x, y))
        spokes = 8 * math.atan2(y, x) / (2 * math.pi) + rings
        assert (math.floor(spokes) + math.floor(rings)) % 2 == (0 if is_lit else 1)
        assert picture[down, 8] == pytest.approx(1 - 0.6 * math.hypot(x, y) if is_lit else 0)


def test_a_picture_is_averaged_over_each_cell_and_may_be_large_on_neither_side(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4), dtype=np.uint8)
    pixels[0, 0], pixels[3, 3] = 40, 120
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    assert open_picture(str(tmp_path / "picture.png"), 2) == pytest.approx(np.diag([0.25, 0.75]))
    for size in ((4097, 1), (1, 4097)):
        Image.new("L", size, 9).save(tmp_path / "picture.png")
        with pytest.raises(ValueError, match="at most 4096 a side"):
            open_picture(str(tmp_path / "picture.png"), 2)


def test_samples_are_painted_beside_their_distribution_in_its_scale() -> None:
    target = np.array([[0, 1 / 3], [0, 2 / 3]])
    painted = paint_beside(torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]]), target)
    assert (painted.shape, painted.dtype) == ((256, 256 + 4 + 256, 1), np.uint8)
    # Of the cells in reading order, with 255 for a probability of 2 / 3, and for what is above it.
    for left, values in ((0, [0, 128, 0, 255]), (260, [0, 255, 96, 0])):
        cells = [
            painted[64 + 128 * down, left + 64 + 128 * across, 0] for down in (0, 1) for across in (0, 1)
        ]
        assert cells == values
    assert (painted[:, 256:260] == 255).all()


@pytest.mark.parametrize(
    ("samples", "labels", "columns"), [(9, 1, 3), (10, 1, 4), (6, 6, 6), (5, 6, 3), (12, 3, 3)]
)
def test_columns_are_those_of_the_labels_or_about_a_square(samples: int, labels: int, columns: int) -> None:
    assert columns_for(samples, labels) == columns


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "BMP", "GIF"])
def test_other_formats_are_refused_whatever_the_name_says(kind: str, picture: Path) -> None:
    Image.open(picture).save(picture, kind)
    with pytest.raises(ValueError, match=r"is no PNG; give a PNG, or 'swirl'"):
        open_picture(str(picture), 2)


def test_damaged_missing_and_black_pictures_are_named(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_picture(str(tmp_path / "absent.png"), 2)
    whole = picture.read_bytes()
    picture.write_bytes(whole[: whole.index(b"IDAT") + 8])
    with pytest.raises(ValueError, match="is damaged"):
        open_picture(str(picture), 2)
    Image.new("L", (4, 4)).save(picture)
    with pytest.raises(ValueError, match="black everywhere"):
        open_picture(str(picture), 2)
    assert swirl(32).max() > 0
