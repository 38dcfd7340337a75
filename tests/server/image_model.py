"""A small image model with random weights: 8 x 8 pixels of 16 greys, two digits of base 4, three named labels."""

from __future__ import annotations

from pathlib import Path

import torch

from prime_core.checkpoint import save_checkpoint
from prime_core.config import CodecConfig, Config, PolynomialConfig, UNetConfig
from prime_core.models.build import build_denoiser

NAME = "tiny-images"
SIDE = 8
LENGTH = SIDE * SIDE
LABELS = ("cat", "dog", "T-shirt/top")


def image_config(**changes: object) -> Config:
    network = {
        "channels": 1,
        "height": SIDE,
        "width": SIDE,
        "model_channels": 32,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_rates": (),
        "head_channels": 32,
        "dropout": 0.0,
        "labels": "class",
        "num_labels": len(LABELS),
        **changes,
    }
    return Config(
        model=UNetConfig.model_validate(network),
        codec=CodecConfig(vocab_size=16, target_length=2),
        schedule=PolynomialConfig(),
        label_names=LABELS if network["labels"] == "class" else (),
    )


def write_image_checkpoint(folder: Path, config: Config | None = None) -> Path:
    config = image_config() if config is None else config
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new network draws from the global state, which depends on earlier tests
        fresh = build_denoiser(config).state_dict()
    state = {
        name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()
    }
    save_checkpoint(folder / NAME, config, state)
    return folder / NAME
