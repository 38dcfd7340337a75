"""A small DiT whose every weight is random, so that nothing about it is symmetric or zero."""

import torch

from prime_core.codec import SubtokenCodec
from prime_core.config import CodecConfig, DiTConfig
from prime_core.models.dit import DiT
from prime_core.schedule import LinearSchedule


def random_dit(
    codec: SubtokenCodec, seed: int = 0, *, length: int = 8, time_conditioned: bool = False
) -> DiT:
    """Return a network in evaluation mode with weights of standard deviation 0.3."""
    config = DiTConfig(
        hidden_size=12 * codec.target_length,
        num_blocks=1,
        num_heads=2,
        cond_dim=4,
        length=length,
        dropout=0.0,
        time_conditioned=time_conditioned,
    )
    sizes = CodecConfig(vocab_size=codec.vocab_size, target_length=codec.target_length)
    model = DiT(config, sizes, LinearSchedule(1e-3))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()
