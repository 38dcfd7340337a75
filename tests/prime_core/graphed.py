"""Small networks whose trunks can be recorded, and calls of them."""

from __future__ import annotations

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.config import CodecConfig, DiTConfig
from prime_core.models.dit import DiT
from prime_core.models.unet import UNet
from prime_core.schedule import CosineSchedule

CODEC = SubtokenCodec(64, 3)  # base 4
MIXES = ([16, 16, 16], [10, 18, 20], [9, 12, 9, 18], [33])
IMAGE_LENGTH = 3 * 2 * 2


def make_dit(*, time_conditioned: bool = False, dtype: torch.dtype = torch.float32) -> DiT:
    config = DiTConfig(
        hidden_size=24, num_blocks=3, num_heads=2, cond_dim=8, length=64, time_conditioned=time_conditioned
    )
    with torch.random.fork_rng(devices=[]):
        network = DiT(config, CodecConfig(vocab_size=64, target_length=3), CosineSchedule())
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    network = network.eval().requires_grad_(False)
    network.prepare()
    return network


def text_call(network: DiT, lengths: list[int], seed: int) -> Tensor:
    """One call at other digits, times and positions for every seed."""
    generator = torch.Generator().manual_seed(seed)
    y_t = torch.randint(0, CODEC.base + 1, (sum(lengths), 3), generator=generator)
    t = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    positions = torch.randint(sum(lengths), (1 + seed % 7,), generator=generator) if seed % 3 else None
    device = next(network.parameters()).device
    return network.features(y_t.to(device), lengths, t.to(device), positions)


def image_call(network: UNet, num_images: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    y_t = torch.randint(0, 5, (num_images * IMAGE_LENGTH, 2), generator=generator)
    t = torch.rand(num_images, generator=generator, dtype=torch.float64)
    labels = torch.randint(network.config.num_labels, (num_images,), generator=generator)
    device = next(network.parameters()).device
    features = network.features(
        y_t.to(device),
        [IMAGE_LENGTH] * num_images,
        t.to(device),
        torch.arange(0, len(y_t), 5),
        labels if network.config.labels == "class" else None,
    )
    return network.head(features)
