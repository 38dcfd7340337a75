"""Scores of images: their units, their labels, and pixels that do not fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from prime_core.codec import SubtokenCodec
from prime_core.config import CodecConfig, UNetConfig
from prime_core.models.unet import UNet
from prime_core.sampling.canvas import CanvasError
from prime_core.schedule import PolynomialSchedule
from prime_core.scoring.score import ScoreRequest, prepare_scores, score
from tests.stubs import stub_checkpoint


def image_checkpoint(labels: str) -> Any:
    config = UNetConfig(
        channels=1,
        height=4,
        width=4,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_rates=(),
        head_channels=32,
        dropout=0.0,
        labels=labels,
        num_labels=1 if labels == "none" else 3,
    )
    codec = SubtokenCodec(16, 2)
    model = UNet(config, CodecConfig(vocab_size=16, target_length=2), PolynomialSchedule()).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    checkpoint = stub_checkpoint(codec, model, schedule=PolynomialSchedule())
    checkpoint.config.model, checkpoint.config.label_names = config, ()
    return checkpoint


def test_images_are_scored_in_bits_per_dimension_under_their_label() -> None:
    checkpoint, pixels = image_checkpoint("class"), torch.arange(16).view(4, 4, 1)
    results = [score(checkpoint, pixels=pixels, label=label, seed=1)[0] for label in (0, 2)]
    assert [result.label for result in results] == [0, 2]
    assert results[0].nelbo != results[1].nelbo
    assert results[0].bits_per_dimension == results[0].nelbo.nats / math.log(2) / 16
    assert (results[0].num_bytes, results[0].bits_per_byte) == (None, None)
    with pytest.raises(CanvasError, match="label must be given"):
        score(checkpoint, pixels=pixels)


def test_every_state_of_a_mixture_has_a_label_of_its_own() -> None:
    checkpoint, pixels = image_checkpoint("uniform"), torch.zeros(4, 4, 1, dtype=torch.int64)
    prepared = prepare_scores(checkpoint, ScoreRequest(pixels=pixels, num_samples=600, seed=1))
    drawn = torch.cat([row.states.labels for row in prepared.rows if row.states.labels is not None])
    assert drawn.bincount().tolist() == pytest.approx([200] * 3, abs=60)
    assert score(checkpoint, pixels=pixels, num_samples=4)[0].label is None
    with pytest.raises(CanvasError, match="no labels to choose"):
        score(checkpoint, pixels=pixels, label=1)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (None, "must be a tensor"),
        (np.zeros((4, 4, 1)), "got torch.float64 of shape"),
        (np.full((4, 4, 1), 200, dtype=np.uint8), r"in 0\.\.15"),
        (torch.zeros(4, 4, dtype=torch.int64), "of shape"),
        (torch.zeros(4, 4, 1), "must be integers"),
        (torch.full((4, 4, 1), 16), r"in 0\.\.15"),
        (torch.full((4, 4, 1), -1), r"in 0\.\.15"),
        (torch.tensor([0, 3, 9, 16])[:, None].expand(4, 4, 1), r"in 0\.\.15"),
        (torch.tensor([0, -1, 9, 15])[:, None].expand(4, 4, 1), r"in 0\.\.15"),
        (torch.zeros(4, 4, 1, dtype=torch.bool), "must be integers"),
    ],
)
def test_pixels_that_do_not_fit(pixels: Any, words: str) -> None:
    with pytest.raises(CanvasError, match=words):
        score(image_checkpoint("none"), pixels=pixels)
