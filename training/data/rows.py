"""What the trainer learns from: numbered rows of tokens, whatever they stand for, and the labels of rows.

Shapes: B rows, L tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prime_core.pixels import PixelCodec
from training.data.dataset import TokenDataset
from training.data.images import ImageSet

TokenRow = npt.NDArray[np.int64]
LabelKind = Literal["none", "class", "uniform"]


class RowSource(Protocol):
    """Rows that can be read in any order; reading one has no memory and no randomness."""

    @property
    def num_rows(self) -> int:
        """Number of rows, at least 1; one epoch is each of them once."""
        ...

    def row(self, index: int) -> TokenRow:
        """Return x_0 (L,) int64: the tokens of row ``index`` in 0..num_rows-1."""
        ...

    def label(self, index: int) -> int | None:
        """Return the label of a row, or None where the data has no labels."""
        ...


class TextRows:
    """Blocks of a token stream."""

    def __init__(self, dataset: TokenDataset, length: int) -> None:
        """Take the stream and L, the tokens of a row."""
        self._dataset, self._length = dataset, length
        self.num_rows = dataset.num_blocks(length)

    def row(self, index: int) -> TokenRow:
        """Return x_0 (L,) int64."""
        return self._dataset.block(index, self._length)

    def label(self, index: int) -> None:
        """Return None: text has no labels."""


class ImageRows:
    """Images as tokens.

    With ``flip`` an epoch holds every image twice, as it is and mirrored left to right. The order of rows is a
    function of (seed, draw number), so which way round an image is drawn is one too.
    """

    def __init__(self, images: ImageSet, codec: PixelCodec, *, flip: bool = False) -> None:
        """Take images of the codec's size.

        Raises:
            ValueError: the network is for pictures of another size.
        """
        if images.picture_shape != codec.picture_shape:
            raise ValueError(
                f"the pictures of {images.name} are (height, width, channels) {images.picture_shape}, but "
                f"model.height, model.width and model.channels (or packing) say {codec.picture_shape}; set these"
            )
        self._images, self._codec = images, codec
        self.num_rows = 2 * len(images) if flip else len(images)

    def row(self, index: int) -> TokenRow:
        """Return x_0 (L,) int64; rows from N on are the mirrored images."""
        mirrored, number = divmod(index, len(self._images))
        pixels = self._images.pixels[number]
        if mirrored:
            pixels = pixels[:, ::-1]
        # A copy: the data set's arrays are read-only, or on disk.
        return self._codec.encode(torch.from_numpy(np.array(pixels))).numpy()

    def label(self, index: int) -> int | None:
        """Return the class of the image; a mirrored image keeps it."""
        labels = self._images.labels
        return None if labels is None else int(labels[index % len(self._images)])


@dataclass(frozen=True)
class LabelSource:
    """Where the labels of a network come from.

    Attributes:
        kind: "class": the data's; "uniform": drawn, for a mixture; "none": the network has no labels.
        num_labels: how many there are.
    """

    kind: LabelKind = "none"
    num_labels: int = 1

    def of(self, source: RowSource, indices: Sequence[int], generator: torch.Generator) -> Tensor | None:
        """Return the labels of some rows.

        Args:
            source: where "class" labels come from.
            indices: numbers of the rows.
            generator: source of "uniform" labels; nothing is drawn for the other kinds.

        Returns:
            (B,) int64, or None without labels.
        """
        if self.kind == "none":
            return None
        if self.kind == "uniform":
            return torch.randint(self.num_labels, (len(indices),), generator=generator)
        return torch.tensor([source.label(index) for index in indices])

    def in_order(self, num_samples: int) -> list[int | None]:
        """Return labels for samples that are looked at: every label in turn; None for networks without."""
        return [None if self.kind == "none" else index % self.num_labels for index in range(num_samples)]


def evenly_spread(count: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Return ``count`` row numbers spread evenly over 0..num_rows-1, ascending; all if there are fewer."""
    return np.linspace(0, num_rows - 1, min(count, num_rows)).astype(np.int64)


def stack_rows(source: RowSource, indices: Sequence[int]) -> Tensor:
    """Return rows as x_0 (B, L) int64."""
    return torch.from_numpy(np.stack([source.row(index) for index in indices]))
