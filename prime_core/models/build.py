"""From a configuration to its network."""

from __future__ import annotations

from prime_core.config import Config, DiTConfig
from prime_core.models.dit import DiT
from prime_core.models.unet import UNet


def build_denoiser(config: Config) -> DiT | UNet:
    """Return the network of a configuration with random weights, on torch's default device."""
    schedule = config.schedule.build()
    if isinstance(config.model, DiTConfig):
        return DiT(config.model, config.codec, schedule)
    return UNet(config.model, config.codec, schedule)
