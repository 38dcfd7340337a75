"""`preview.png`: what the averaged weights of a run draw, painted at every evaluation.

Shapes: N samples, L tokens, H and W pixels high and wide, V cells of a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.noise import row_seed
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser
from prime_core.pictures import GRID_GAP, Pixels
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.row import new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.schedule import Schedule

PREVIEW_NAME = "preview.png"

_MAX_TOKENS = 2**16  # of one denoiser call
_SEED = 0
_MIN_PANEL = 256  # pixels: panels of few cells are enlarged to about this size


def draw_preview(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    length: int,
    steps: int,
    labels: Sequence[int | None],
) -> Tensor:
    """Draw samples with a fixed seed, so that pictures of one run can be compared.

    Args:
        denoiser: network in evaluation mode.
        codec: tokens to digits.
        schedule: noise schedule.
        length: L.
        steps: steps of the sampler.
        labels: the label of each of N samples, None for networks without labels.

    Returns:
        x_0 (N, L) int64.

    Raises:
        FloatingPointError: the network gave no finite logits.
    """
    canvas = digits_canvas(codec, torch.full((length, codec.target_length), codec.mask_index))
    rows = [
        new_row(canvas, schedule, SamplingSettings(), steps, row_seed(_SEED, index), label=label)
        for index, label in enumerate(labels)
    ]
    run_rows(Stepper(denoiser, codec), rows, max_rows=max(1, _MAX_TOKENS // length))
    if any(row.failed for row in rows):
        raise FloatingPointError(
            f"{PREVIEW_NAME}: the averaged weights give values that are not finite; lower learning_rate, or "
            "train in float32"
        )
    return codec.decode(torch.stack([row.y.cpu() for row in rows]))


def paint_beside(x_0: Tensor, target: npt.NDArray[np.float64]) -> Pixels:
    """Paint a distribution over cells beside the histogram of samples, in the same scale.

    Args:
        x_0: (N, 2) tokens: down, across.
        target: (V, V) probabilities.

    Returns:
        (H', W', 1) uint8: the target, a white line, the samples.
    """
    num_cells = len(target)
    down, across = x_0.numpy().T
    histogram = np.bincount(down * num_cells + across, minlength=num_cells**2).reshape(target.shape) / len(
        x_0
    )
    scale = -(-_MIN_PANEL // num_cells)
    panels = [
        np.kron((panel / target.max()).clip(0, 1) * 255, np.ones((scale, scale)))
        for panel in (target, histogram)
    ]
    line = np.full((len(panels[0]), 2 * GRID_GAP), 255.0)
    return np.hstack([panels[0], line, panels[1]]).round().astype(np.uint8)[..., None]


def columns_for(num_samples: int, num_labels: int) -> int:
    """Return how many images to put side by side: one of each label, or about a square."""
    return num_labels if 1 < num_labels <= num_samples else math.ceil(math.sqrt(num_samples))
