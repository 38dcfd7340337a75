"""The two-dimensional toy: a PNG, and nothing else, as a distribution over cells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.toy2d import NUM_ROWS, Toy2dRows, open_picture, swirl


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
