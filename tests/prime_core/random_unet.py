"""A small image network that no training has touched, but whose output is not zero."""

from typing import Any

import torch

from prime_core.config import CodecConfig, UNetConfig
from prime_core.models.unet import UNet
from prime_core.schedule import LinearSchedule


def random_unet(**others: Any) -> UNet:
    config = UNetConfig(
        height=2,
        width=2,
        model_channels=32,
        channel_mult=(3, 2),
        num_res_blocks=1,
        head_channels=32,
        **others,
    )
    codec = CodecConfig(vocab_size=16, target_length=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = UNet(config, codec, LinearSchedule()).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network
