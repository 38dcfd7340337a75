"""What is called before a model serves: one call on a CPU, on a GPU one for every set of kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from prime_core.checkpoint import load_checkpoint
from prime_core.config import CodecConfig, Config, UNetConfig
from prime_core.sampling.draw_settings import join_draw_settings
from prime_core.sampling.row import Row
from prime_core.sampling.stepper import AnyRow, Stepper
from server.engine.warm_up import trial_calls
from tests.server.image_model import write_image_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def kernels_of(rows: Sequence[AnyRow]) -> tuple[str, bool, bool]:
    """How the rows of a call are drawn, and which truncations Triton compiles kernels for."""
    drawn = [row for row in rows if isinstance(row, Row)]
    if not drawn:
        return "scored", False, False
    joined = join_draw_settings([row.draws for row in drawn], [row.span for row in drawn])
    return drawn[0].settings.draw, joined.top_k is not None, joined.top_p is not None


@pytest.mark.parametrize("kind", ["text", "images"])
def test_every_set_of_kernels_is_met_on_a_gpu(kind: str, model_path: Path, images_path: Path) -> None:
    checkpoint = load_checkpoint(model_path if kind == "text" else images_path)
    draws = {"text": ["joint"], "images": ["joint", "marginal"]}[kind]
    calls = list(trial_calls(checkpoint, GPU))
    assert {kernels_of(rows) for rows in calls} == {
        ("scored", False, False),
        *itertools.product(draws, [False, True], [False, True]),
    }
    stepper = Stepper(checkpoint.denoiser, checkpoint.codec)
    assert all(result.ok for rows in calls for result in stepper.step(rows))


def test_pictures_whose_channels_are_packed_are_scored_too(tmp_path: Path) -> None:
    network = UNetConfig(
        channels=2,
        height=8,
        width=8,
        packing="rgb24",
        model_channels=32,
        channel_mult=(1,),
        attention_rates=(),
        head_channels=32,
    )
    config = Config(model=network, codec=CodecConfig(vocab_size=4096, target_length=1))
    checkpoint = load_checkpoint(write_image_checkpoint(tmp_path, config))
    *_, scored = trial_calls(checkpoint, GPU)
    assert kernels_of(scored)[0] == "scored"
    assert scored[0].length == 2 * 8 * 8


def test_a_cpu_compiles_nothing(model_path: Path) -> None:
    (rows,) = trial_calls(load_checkpoint(model_path), CPU)
    assert not kernels_of(rows)[1] and not kernels_of(rows)[2]
