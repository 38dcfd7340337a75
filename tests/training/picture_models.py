"""Tiny image models with random weights, as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from prime_core.checkpoint import save_checkpoint
from prime_core.config import CodecConfig, Config, PolynomialConfig, UNetConfig
from prime_core.models.build import build_denoiser


def write_image_model(
    folder: Path,
    labels: Literal["none", "class", "uniform"] = "class",
    *,
    num_labels: int = 2,
    size: int = 8,
    channels: int = 1,
    target_length: int = 2,
    packing: Literal["none", "rgb24"] = "none",
    scale: float = 0.3,
    provenance: dict[str, Any] | None = None,
    label_names: tuple[str, ...] = (),
) -> Path:
    """A U-Net of one block; its weights are zero if ``scale`` is."""
    config = Config(
        model=UNetConfig(
            channels=channels,
            height=size,
            width=size,
            packing=packing,
            model_channels=32,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_rates=(),
            head_channels=32,
            dropout=0.0,
            labels=labels,
            num_labels=1 if labels == "none" else num_labels,
        ),
        codec=CodecConfig(vocab_size=4096 if packing == "rgb24" else 256, target_length=target_length),
        schedule=PolynomialConfig(power=3.0),
        label_names=label_names,
        provenance={} if provenance is None else provenance,
    )
    with torch.random.fork_rng(devices=[]):
        model = build_denoiser(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    path = folder / "model"
    save_checkpoint(path, config, model.state_dict())
    return path
