"""Draws images of a model by their index: image i depends only on the settings, the seed and i.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernels.noise import row_seed
from prime_core.checkpoint import Checkpoint
from prime_core.sampling.prepare import ImageSample, PreparedRows, prepare_rows
from prime_core.sampling.request import ImageRequest
from prime_core.sampling.row import Row
from training.progress import progress_bar
from training.row_loop import finished_rows


@dataclass(frozen=True)
class ImageDraws:
    """What is drawn.

    Attributes:
        checkpoint: an image model.
        fields: fields of an `ImageRequest`, without n, seed and label.
        seed: of the whole: image i has the seed `row_seed(seed, i)`.
        label: of all images, by number or name; None: by turns over the classes, or what the model draws if its
            labels are no classes.
    """

    checkpoint: Checkpoint
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    label: int | str | None = None

    def prepare(self, index: int) -> PreparedRows:
        """Return the rows of one image.

        Raises:
            ValueError: a setting does not fit the model, or is out of range.
        """
        model = self.checkpoint.config.image_model
        label = self.label
        if label is None and model.labels == "class":
            label = index % model.num_labels
        request = ImageRequest(n=1, seed=row_seed(self.seed, index), label=label, **self.fields)
        return prepare_rows(self.checkpoint, request)


def draw_images(
    draws: ImageDraws, indices: Sequence[int], max_rows: int, *, progress: bool = True
) -> Iterator[tuple[int, ImageSample]]:
    """Draw images and yield each as soon as it is done.

    Args:
        draws: what is drawn.
        indices: which images.
        max_rows: most rows in one denoiser call.
        progress: show a progress bar; it counts parts of images, so it moves with every denoiser call.

    Yields:
        index and image, in the order in which they finish.

    Raises:
        ValueError: a setting does not fit the model, or is out of range.
        NonFiniteError: the network gave no finite logits for a row.
    """
    form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
    with progress_bar(total=len(indices), desc="sampling", bar_format=form, shown=progress) as bar:

        def count(rows: Sequence[Row]) -> None:
            done = sum(1 / row.plan.nfe for row in rows)
            bar.update(min(done, len(indices) - bar.n))  # a sum of fractions may pass the total by an ulp

        for index, sample in finished_rows(draws.checkpoint, draws.prepare, indices, max_rows, count):
            assert isinstance(sample, ImageSample), "an image model makes images"
            yield index, sample
