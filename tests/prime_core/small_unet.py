"""A small image network whose every weight is random, and digits for it."""

from typing import Any

import torch
from torch import Tensor

from prime_core.config import CodecConfig, UNetConfig
from prime_core.models.unet import UNet
from prime_core.schedule import PolynomialSchedule

CODEC = CodecConfig(vocab_size=16, target_length=2)  # base 4
LENGTH = 3 * 8 * 4


def make_config(**others: Any) -> UNetConfig:
    sizes: dict[str, Any] = {
        "height": 8,
        "width": 4,
        "model_channels": 32,
        "channel_mult": (3, 2),
        "num_res_blocks": 1,
        "head_channels": 32,
        "dropout": 0.0,
    }
    return UNetConfig(**{**sizes, **others})


def make_network(seed: int = 0, **others: Any) -> UNet:
    with torch.random.fork_rng(devices=[]):
        network = UNet(make_config(**others), CODEC, PolynomialSchedule(3.0))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        fan = parameter[0].numel() if parameter.ndim > 2 else 25
        centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.data = centre + torch.randn(parameter.shape, generator=generator) / fan**0.5
    return network.eval()


def digits(batch: int = 3, seed: int = 0) -> Tensor:
    size = (batch, 3, 8, 4, 2)
    return torch.randint(0, CODEC.base + 1, size, generator=torch.Generator().manual_seed(seed))


def packed(y_t: Tensor) -> tuple[Tensor, list[int]]:
    """Return the images laid end to end, and their lengths."""
    return y_t.flatten(0, 3), [LENGTH] * len(y_t)
