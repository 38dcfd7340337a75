"""The two-dimensional toy: a grey picture as a distribution over V x V cells, whose entropy is known exactly.

A row is the cell's two tokens (down, across), each in 0..V-1. Brightness is probability, so what a model has learned
can be looked at, and its likelihood bound can be compared with the entropy, below which no bound can be.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from training.data.rows import TokenRow

BUILT_IN = "swirl"
# A row is one of so many equal parts of the probability, cell by cell: a cell's share is off by at most one part.
NUM_ROWS = 2**20
_MAX_SIDE = 4096  # of a picture file; a bound on what a hostile header can make the reader allocate

Probabilities = npt.NDArray[np.float64]


class Toy2dRows:
    """Cells of a distribution, each in as many rows as its probability is large.

    Row i is the cell at quantile (i + 1/2) / num_rows, so an epoch is the distribution itself, and rows that are
    evenly spread over 0..num_rows-1 are spread evenly over it.

    Attributes:
        probabilities: (V, V) float64, they sum to 1.
        num_rows: rows of an epoch.
        entropy: of a row, in nats.
    """

    num_rows = NUM_ROWS

    def __init__(self, probabilities: Probabilities) -> None:
        """Take the distribution over cells."""
        self.probabilities = probabilities
        positive = probabilities[probabilities > 0]
        self.entropy = -float((positive * np.log(positive)).sum())
        quantiles = (np.arange(NUM_ROWS) + 0.5) / NUM_ROWS
        cells = np.flatnonzero(probabilities)
        ends = np.cumsum(probabilities.flat[cells])
        # Of cells with probability alone: rounding may leave the last end an ulp below the last quantile.
        self._cells = cells[np.searchsorted(ends, quantiles).clip(max=len(cells) - 1)]

    def row(self, index: int) -> TokenRow:
        """Return x_0 (2,) int64: down, across."""
        return np.array(divmod(int(self._cells[index]), len(self.probabilities)))

    def label(self, index: int) -> None:
        """Return None: cells have no labels."""


def open_picture(picture: str, num_cells: int) -> Probabilities:
    """Return a picture as a distribution.

    Args:
        picture: "swirl", or the path of a PNG file, which is made grey and scaled to V x V.
        num_cells: V, cells of a side.

    Returns:
        (V, V) float64 that sums to 1, rows from the top; proportional to the brightness.

    Raises:
        ValueError: the file is no picture, too large, or black everywhere.
    """
    brightness = swirl(num_cells) if picture == BUILT_IN else _read_grey(Path(picture), num_cells)
    if not brightness.any():
        raise ValueError(f"data.picture {picture} is black everywhere: brightness is probability")
    cells: Probabilities = brightness / brightness.sum()
    return cells


def swirl(num_cells: int) -> Probabilities:
    """Draw the built-in picture: the squares of a chessboard wound round a centre, on a disc.

    Args:
        num_cells: V, cells of a side.

    Returns:
        (V, V) float64 in [0, 1]: squares fade outwards, the others and the ground are black.
    """
    axis = (np.arange(num_cells) + 0.5) / num_cells * 2 - 1
    x, y = np.meshgrid(axis, -axis)
    radius, angle = np.hypot(x, y), np.arctan2(y, x) / (2 * math.pi)
    rings = np.log(np.maximum(radius, 1e-9)) * 2.0
    spokes = angle * 8 + rings
    is_square = (np.floor(spokes) + np.floor(rings)) % 2 == 0
    is_disc = (radius < 0.97) & (radius > 0.1)
    return np.where(is_square & is_disc, 1 - 0.6 * radius, 0.0)


def _read_grey(path: Path, num_cells: int) -> Probabilities:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if max(picture.size) > _MAX_SIDE:
                raise ValueError(f"data.picture {path} is {picture.size} pixels, at most {_MAX_SIDE} a side")
            grey = picture.convert("L").resize((num_cells, num_cells), Image.Resampling.BOX)
    except UnidentifiedImageError:
        raise ValueError(f"data.picture {path} is no PNG; give a PNG, or {BUILT_IN!r}") from None
    except FileNotFoundError:
        raise ValueError(f"data.picture {path} does not exist; give a PNG, or {BUILT_IN!r}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data.picture {path} is damaged: {error}") from None
    return np.asarray(grey, dtype=np.float64) / 255
